"""Plots the loss curve of a run."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from moecluster.errors import DataError
from moecluster.training.history import History
from moecluster.whole_file import writing_whole

SIZE_INCHES = (8.0, 4.8)
DOTS_PER_INCH = 120


def draw_loss_curve(history: History, path: str | Path) -> None:
    """Draws training and validation cross-entropy and the unigram entropy, all in bits per byte; below, the auxiliary
    losses by kind, if there are any.

    The file name's suffix selects the image format: .png, .svg, .pdf. Raises DataError if there are no steps.
    """
    if history.started is None or not history.steps:
        raise DataError(f"{history.path} has no step to draw: train first")
    bits = 1 / (math.log(2) * history.started.bytes_per_token)
    # Figure instead of pyplot: it needs no display and shares no global state.
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    steps = sorted(history.steps)
    kinds = sorted({kind for step in history.steps.values() for kind in step.aux_losses or {}})
    axes, *below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1)) if kinds else (figure.subplots(),)
    apart = {s: history.steps[s].loss * bits for s in steps if history.steps[s].aux_losses is not None}
    mixed = {s: history.steps[s].loss * bits for s in steps if history.steps[s].aux_losses is None}
    for losses, label in ((apart, "training"), (mixed, "training, auxiliary losses included")):
        if losses:
            axes.plot(list(losses), list(losses.values()), linewidth=0.8, alpha=0.6, label=label)
    evaluated = sorted(history.evaluations)
    if evaluated:
        values = [history.evaluations[s].bits_per_byte for s in evaluated]
        axes.plot(evaluated, values, marker="o", markersize=4, label="validation")
        domains = history.evaluations[evaluated[-1]].domains
        for name in sorted(domains) if len(domains) > 1 else ():
            points = [history.evaluations[s].domains.get(name, math.nan) for s in evaluated]
            axes.plot(evaluated, points, linewidth=0.8, linestyle=":", label=f"validation, {name}")
    unigram = history.started.unigram_bits_per_byte
    axes.axhline(unigram, color="gray", linestyle="--", linewidth=1, label=f"unigram entropy, {unigram:.2f}")
    axes.set_ylabel("cross-entropy, bits per byte")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    for panel in below:
        for kind in kinds:
            panel.plot(steps, [(history.steps[s].aux_losses or {}).get(kind, math.nan) for s in steps], label=kind)
        panel.set_ylabel("auxiliary losses")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    (below[-1] if below else axes).set_xlabel("step")
    with writing_whole(Path(path)) as aside:
        figure.savefig(aside)

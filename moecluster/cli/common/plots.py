"""Plots replays and simulations. Needs matplotlib."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moecluster.simulation.replay import ReplayedWindow
from moecluster.simulation.scaling_law import MeasuredSize, fit_power_law
from moecluster.simulation.scenario import SimulatedWindow
from moecluster.whole_file import writing_whole

DOTS_PER_INCH = 120
LINE_STYLES = ("-", "--", ":", "-.")  # so that policies with equal curves stay visible
MOST_HOURS_IN_MINUTES = 3.0  # up to this, times are shown in minutes


def draw_replay(replays: Mapping[str, Sequence[ReplayedWindow]], path: Path) -> None:
    """Plots balancedness and moved bytes of each policy, above the load. The file extension gives the image format."""
    figure = Figure(figsize=(9.0, 7.2), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.4))
    for (policy, windows), style in zip(replays.items(), itertools.cycle(LINE_STYLES), strict=False):
        scored = windows[1:]
        times, unit = _times([window.time_s - windows[0].time_s for window in scored])
        judged = [window.balancedness for window in scored if window.balancedness is not None]
        label = f"{policy} (mean {np.mean(judged):.3f})" if judged else f"{policy} (nothing to judge)"
        panels[0].plot(times, _gaps(window.balancedness for window in scored), style, linewidth=1.2, label=label)
        moved_gb = np.cumsum([window.moved_bytes for window in scored]) / 1e9
        panels[1].plot(times, moved_gb, style, linewidth=1.2, label=f"{policy} ({moved_gb[-1]:,.1f} GB)")
    tokens = [window.tokens / 1e6 for window in scored]
    panels[2].fill_between(times, tokens, step="mid", alpha=0.4, color="gray", linewidth=0)
    _name(panels[0], "balancedness\n(1 is perfect)", legend=True)
    panels[0].set_ylim(0, 1.03)
    _name(panels[1], "moved, GB\n(after the first plan)", legend=True)
    panels[1].set_ylim(bottom=0)
    _name(panels[2], "assignments\na window, millions")
    panels[2].set_ylim(bottom=0)
    panels[2].set_xlabel(f"{unit} since the first plan")
    panels[2].set_xlim(times[0], times[-1])
    figure.suptitle("What each policy would have done: every window scored on the placement decided before it")
    with writing_whole(path) as aside:
        figure.savefig(aside)


def draw_simulation(windows: Sequence[SimulatedWindow], sizes: Sequence[MeasuredSize], title: str, path: Path) -> None:
    """Plots the users' view, the cluster's changes, and the controller's work; with sizes, how that work grows."""
    figure = Figure(figsize=(13.0, 9.0), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(3, 2)
    times, unit = _times([window.time_s for window in windows])
    _throughput(panels[0, 0], times, windows)
    _latency(panels[0, 1], times, windows)
    _balance(panels[1, 0], times, windows)
    _availability(panels[1, 1], times, windows)
    _moves(panels[2, 0], times, windows)
    for axes in (*panels[0], *panels[1], panels[2, 0]):
        axes.set_xlim(0, times[-1])
        axes.set_xlabel(unit)
    if sizes:
        _growth(panels[2, 1], sizes)
    else:
        _controller(panels[2, 1], windows, unit)
    figure.suptitle(title)
    with writing_whole(path) as aside:
        figure.savefig(aside)


def _throughput(axes: Axes, times: Sequence[float], windows: Sequence[SimulatedWindow]) -> None:
    axes.fill_between(times, [w.tokens_per_s for w in windows], alpha=0.3, color="gray", linewidth=0, label="came")
    axes.plot(times, [w.served_per_s for w in windows], linewidth=1.2, label="served")
    axes.set_ylim(bottom=0)
    _name(axes, "tokens a second", legend=True)


def _latency(axes: Axes, times: Sequence[float], windows: Sequence[SimulatedWindow]) -> None:
    axes.plot(times, _gaps(w.step_s for w in windows), linewidth=1.2, label="a step through all MoE layers")
    waits = _gaps(w.wait_s if w.wait_s is not None and w.wait_s > 1e-3 else None for w in windows)
    axes.plot(times, waits, linewidth=1.2, marker=".", markersize=3, label="waiting before it (where over 1 ms)")
    axes.set_yscale("log")
    _name(axes, "seconds", legend=True)


def _balance(axes: Axes, times: Sequence[float], windows: Sequence[SimulatedWindow]) -> None:
    axes.plot(times, _gaps(w.balancedness for w in windows), linewidth=1.2, color="tab:green")
    axes.set_ylim(0, 1.03)
    _name(axes, "balancedness (1 is perfect)")


def _availability(axes: Axes, times: Sequence[float], windows: Sequence[SimulatedWindow]) -> None:
    axes.plot(times, [100 * w.availability for w in windows], linewidth=1.2, color="tab:blue")
    deaths = [(time, w.deaths) for time, w in zip(times, windows, strict=True) if w.deaths]
    for time, _ in deaths:
        axes.axvline(time, color="tab:red", linewidth=0.8, alpha=0.5)
    total = sum(count for _, count in deaths)
    axes.plot([], [], color="tab:red", linewidth=0.8, label=f"actors die ({total} in all)")
    axes.set_ylim(top=100.0 + 0.02 * max(100.0 - min(100 * w.availability for w in windows), 0.1))
    _name(axes, "tokens that need no lost expert, %", legend=True)


def _moves(axes: Axes, times: Sequence[float], windows: Sequence[SimulatedWindow]) -> None:
    first = next((i for i, w in enumerate(windows) if w.decisions), 0)
    cold_gb = windows[first].moved_bytes / 1e9
    moved_gb = np.cumsum([0.0 if i <= first else w.moved_bytes for i, w in enumerate(windows)]) / 1e9
    axes.plot(times, moved_gb, linewidth=1.2, color="tab:orange")
    axes.set_ylim(bottom=0)
    axes.set_title(f"besides the first plan's {cold_gb:,.0f} GB", fontsize=9)
    _name(axes, "moved, GB in all")


def _controller(axes: Axes, windows: Sequence[SimulatedWindow], unit: str) -> None:
    decisions = [decision for window in windows for decision in window.decisions]
    times, _ = _times([decision.time_s for decision in decisions], unit)
    axes.plot(times, [1e3 * decision.decide_s for decision in decisions], ".", markersize=3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(unit)
    _name(axes, "a decision, ms (measured)")


def _growth(axes: Axes, sizes: Sequence[MeasuredSize]) -> None:
    actors = [size.actors for size in sizes]
    for label, seconds in (
        ("first plan", [size.cold_decide_s for size in sizes]),
        ("a decision", [size.decide_s for size in sizes]),
        ("taking counters in", [size.observe_s for size in sizes]),
    ):
        law = fit_power_law(actors, seconds)
        (line,) = axes.plot(actors, [1e3 * s for s in seconds], "o", markersize=4)
        fitted = [1e3 * law.factor * size**law.exponent for size in actors]
        axes.plot(actors, fitted, linewidth=1.0, color=line.get_color(), label=f"{label}: actors^{law.exponent:.2f}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(actors, labels=[str(size) for size in actors])
    axes.minorticks_off()
    axes.set_xlabel("actors")
    _name(axes, "ms (measured)", legend=True)


def _times(seconds: Sequence[float], unit: str | None = None) -> tuple[list[float], str]:
    """Returns times for an axis, and their unit: the given one, or one that suits the last time."""
    unit = unit or ("hours" if seconds and seconds[-1] > MOST_HOURS_IN_MINUTES * 3600 else "minutes")
    return [second / (3600.0 if unit == "hours" else 60.0) for second in seconds], unit


def _gaps(values: Iterable[float | None]) -> list[float]:
    """Returns the values with NaN for None, so that lines have gaps."""
    return [np.nan if value is None else value for value in values]


def _name(axes: Axes, quantity: str, *, legend: bool = False) -> None:
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=9)

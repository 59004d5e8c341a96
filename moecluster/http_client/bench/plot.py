"""Plots a load. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moecluster.http_client.bench.request import Measured
from moecluster.http_client.bench.summary import Slo, in_flight_over_time, rate_over_time
from moecluster.whole_file import writing_whole

DOTS_PER_INCH = 120
NUM_BINS = 60


def draw_load(measured: Sequence[Measured], slo: Slo, title: str, path: Path) -> None:
    """Plots latency distributions, and throughput and errors over time. The file extension gives the image format."""
    figure = Figure(figsize=(11.0, 7.0), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(2, 2)
    ended = [m for m in measured if not m.error]
    first_s = [s for m in ended if (s := m.time_to_first_token_s) is not None]
    _distribution(panels[0, 0], first_s, "time to first token, ms", "requests", slo.time_to_first_token_s, "SLO")
    gaps_s = [s for m in ended for s in m.inter_token_s]
    limit = "SLO (of a request's mean)"
    _distribution(panels[0, 1], gaps_s, "between two tokens, ms", "tokens", slo.inter_token_s, limit)
    duration_s = max(max((m.ended_s for m in measured), default=0.0), 1e-9)
    _throughput(panels[1, 0], measured, duration_s)
    _in_flight(panels[1, 1], measured, duration_s)
    figure.suptitle(title)
    with writing_whole(path) as aside:
        figure.savefig(aside)


def _distribution(
    axes: Axes, seconds: Sequence[float], quantity: str, what: str, limit_s: float | None, limit: str
) -> None:
    """Plots the cumulative distribution."""
    if seconds:
        sorted_ms = 1e3 * np.sort(np.asarray(seconds))
        axes.step(sorted_ms, 100 * np.arange(1, len(sorted_ms) + 1) / len(sorted_ms), where="post", linewidth=1.4)
        for percentile, style in ((50, ":"), (99, "--")):
            value = float(np.percentile(sorted_ms, percentile))
            label = f"p{percentile}: {value:,.3g} ms"
            axes.axvline(value, linestyle=style, color="gray", linewidth=1.0, label=label)
        if sorted_ms[0] > 0 and sorted_ms[-1] > 20 * sorted_ms[0]:
            axes.set_xscale("log")
    if limit_s is not None:
        axes.axvline(1e3 * limit_s, color="tab:red", linewidth=1.2, label=f"{limit}: {1e3 * limit_s:,.4g} ms")
    axes.set_ylim(0, 101)
    axes.set_xlabel(quantity)
    _name(axes, f"{what} within it, %", legend=bool(seconds) or limit_s is not None)


def _throughput(axes: Axes, measured: Sequence[Measured], duration_s: float) -> None:
    times_s, rates = rate_over_time([s for m in measured for s in m.chunks_s], duration_s, NUM_BINS)
    axes.step(times_s, rates, where="mid", linewidth=1.2)
    axes.fill_between(times_s, rates, step="mid", alpha=0.25, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, duration_s)
    axes.set_xlabel("seconds")
    _name(axes, "tokens a second")


def _in_flight(axes: Axes, measured: Sequence[Measured], duration_s: float) -> None:
    times_s, levels = in_flight_over_time(measured)
    axes.step(times_s, levels, where="post", linewidth=1.2, color="tab:green", label="requests under way")
    failed_s = [m.ended_s for m in measured if m.error]
    if failed_s:
        label = f"errors ({len(failed_s)})"
        axes.plot(failed_s, [0.0] * len(failed_s), "x", color="tab:red", markersize=6, label=label, clip_on=False)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, duration_s)
    axes.set_xlabel("seconds")
    _name(axes, "requests", legend=True)


def _name(axes: Axes, quantity: str, *, legend: bool = False) -> None:
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=9)

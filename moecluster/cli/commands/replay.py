"""replay: simulates policies on a recorded trace."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from moecluster.cli.common.formatting import shown_part
from moecluster.cli.common.output_files import check_writable, write_report
from moecluster.cli.common.tables import make_table, show_table
from moecluster.errors import ConfigError, DataError
from moecluster.placement.load.window import ExponentialWindow
from moecluster.placement.policy.registry import policy_named
from moecluster.simulation.layouts import usual_budget_bytes
from moecluster.simulation.replay import Replay, ReplayedWindow, ReplaySummary, replay_fleet, summarize
from moecluster.simulation.trace.reader import open_trace

SHOWN_CHANGES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayChoice:
    """The user's options. None: as recorded, or the default in the command's help."""

    policies: Sequence[str]
    num_actors: int | None = None
    slots: int | None = None
    budget_gb: float | None = None
    half_life_s: float | None = None
    plot: Path | None = None
    json: Path | None = None


def replay(trace_path: Path, choice: ReplayChoice, console: Console) -> None:
    """Replays a trace under each policy, and shows the results side by side."""
    trace = open_trace(trace_path)
    fleet, actors = replay_fleet(trace.header, num_actors=choice.num_actors, slots=choice.slots)
    budget_bytes = usual_budget_bytes(fleet) if choice.budget_gb is None else 1e9 * choice.budget_gb
    half_life_s = trace.header.window_s if choice.half_life_s is None else choice.half_life_s
    if not half_life_s > 0:
        raise ConfigError(f"--half-life-s: got {half_life_s:g}, expected more than 0")
    check_writable(choice.plot, choice.json)
    replays: dict[str, list[ReplayedWindow]] = {}
    policies = {name: policy_named(name) for name in choice.policies}
    for name, policy in policies.items():
        window = ExponentialWindow({x.layer: x.experts for x in trace.header.layers}, half_life_s=half_life_s)
        replaying = Replay(trace.header, policy, fleet, actors, window, budget_bytes=budget_bytes)
        replays[name] = [replaying.step(seen) for seen in track(trace.windows(), name, console=console, transient=True)]
    summaries = [summarize(name, windows) for name, windows in replays.items()]
    if all(summary.lost_part is None for summary in summaries):
        raise DataError(f"{trace_path}: no window after the first has a token: there is nothing to judge")
    title = f"{trace.header.model}: {fleet.num_actors} actors, {fleet.slots_A.sum()} slots for each layer"
    console.print(title, highlight=False)
    show_table(_table(summaries), console)
    for name, windows in replays.items():
        _show_changes(name, windows, console)
    report = {
        "trace": str(trace_path),
        "model": trace.header.model,
        "actors": fleet.num_actors,
        "slots_per_layer": int(fleet.slots_A.sum()),
        "budget_bytes": budget_bytes,
        "summaries": [dataclasses.asdict(summary) for summary in summaries],
        "windows": {name: [dataclasses.asdict(window) for window in windows] for name, windows in replays.items()},
    }
    write_report(choice.json, report, console)
    if choice.plot is not None:
        from moecluster.cli.common.plots import draw_replay  # needs matplotlib

        draw_replay(replays, choice.plot)
        console.print(f"as a picture: {choice.plot}", highlight=False)


def _table(summaries: Sequence[ReplaySummary]) -> Table:
    table = make_table("", *(summary.policy for summary in summaries), prose=("",))
    rows: list[tuple[str, list[str]]] = [
        ("windows, of them scored", [f"{s.windows}, {s.judged}" for s in summaries]),
        ("balancedness, mean (worst)", [_balancedness(s) for s in summaries]),
        ("first plan moved", [_gb(s.cold_bytes) for s in summaries]),
        ("moved after it", [_gb(s.moved_bytes) for s in summaries]),
        ("decisions that moved anything", [f"{s.changes}" for s in summaries]),
        ("assignments to lost experts", ["" if s.lost_part is None else shown_part(s.lost_part, 3) for s in summaries]),
        (
            "a decision, median (worst)",
            [f"{1e3 * s.median_decide_s:.1f} ({1e3 * s.max_decide_s:.0f}) ms" for s in summaries],
        ),
    ]
    for name, values in rows:
        table.add_row(name, *values)
    return table


def _balancedness(summary: ReplaySummary) -> str:
    if summary.mean_balancedness is None or summary.worst_balancedness is None:
        return "nothing to judge"
    return f"{summary.mean_balancedness:.4f} ({summary.worst_balancedness:.3f})"


def _show_changes(name: str, windows: Sequence[ReplayedWindow], console: Console) -> None:
    changes = sorted((w for w in windows[1:] if w.moved_bytes > 0), key=lambda w: -w.moved_bytes)[:SHOWN_CHANGES]
    if changes:
        console.print(f"{name}: largest changes after the first plan", highlight=False)
    for window in sorted(changes, key=lambda w: w.time_s):
        console.print(
            f"  at {window.time_s:,.0f} s  {_gb(window.moved_bytes)}  {escape(window.reason)}", highlight=False
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"

"""plan: shows what a policy would change in a running cluster. Changes nothing."""

import dataclasses

from rich.console import Console
from rich.table import Table

from moecluster.cli.common.cluster_choice import ClusterChoice
from moecluster.cli.common.formatting import shown_bytes, to_json
from moecluster.cli.common.live_controller import LiveController
from moecluster.cli.common.tables import make_table, show_table
from moecluster.types import PlanPreview

MAX_ROWS = 40  # of the table; --json has all


def plan(choice: ClusterChoice, policy: str, as_json: bool, console: Console) -> None:
    """Shows which replicas the policy would add and remove, the gain and the cost."""
    with LiveController(choice) as controller:
        preview = controller.ask(lambda calls: calls.plan(policy))
    if as_json:
        console.print_json(to_json(dataclasses.asdict(preview)))
        return
    console.print(f"{preview.policy}: {preview.reason}", highlight=False, markup=False)
    console.print(_balancedness(preview), highlight=False)
    console.print(
        f"replicas: {len(preview.added)} to add, {len(preview.removed)} to remove; "
        f"shares: {preview.changed_shares} to change; {shown_bytes(preview.moved_bytes)} to load",
        highlight=False,
    )
    if preview.added or preview.removed:
        show_table(_table(preview), console)
    console.print("nothing was done")


def _balancedness(preview: PlanPreview) -> str:
    before, after = preview.balancedness_before, preview.balancedness_after
    if before is None or after is None:
        return "balancedness not known: no token was counted yet, so every expert counts as equally wanted"
    return f"balancedness {before:.3f} now, {after:.3f} predicted ({after - before:+.3f})"


def _table(preview: PlanPreview) -> Table:
    table = make_table("", "expert", "actor", "share", box=None, pad_edge=False)
    changes = sorted(
        [(r.expert, "add", r.actor, f"{r.share:.3f}") for r in preview.added]
        + [(r.expert, "remove", r.actor, "") for r in preview.removed]
    )
    for expert, change, actor, share in changes[:MAX_ROWS]:
        table.add_row(change, str(expert), actor, share)
    if len(changes) > MAX_ROWS:
        table.caption = f"and {len(changes) - MAX_ROWS} more, which --json shows"
    return table

"""Printed tables are complete: on a pipe nothing is wrapped or cut, on a narrow terminal ids are never split."""

import io
import re

import pytest
from rich.console import Console

from actors.names import Endpoints
from moecluster.cli.commands.batch import _table as batch_table
from moecluster.cli.commands.params import _table as params_table
from moecluster.cli.commands.plan import _table as plan_table
from moecluster.cli.commands.status import actors_table
from moecluster.cli.common.console import make_console
from moecluster.cli.common.formatting import operations_table
from moecluster.cli.common.tables import make_table, show_table
from moecluster.http_client.batch.tally import Tally
from moecluster.models.description import ModelDescription
from moecluster.types import ExpertId, Operation, OperationKind, OperationPhase, PlanPreview, Replica

ADDRESSES = [f"2001:db8:85a3:8d3:1319:8a2e:370:{number}" for number in range(7340, 7349)]
REASON = "the load of layer 17 moved to experts that stand on one node alone, and a spare slot is free on another"
ENDPOINTS = {
    f"expert-{number}": Endpoints(
        actor=f"expert-{number}", pid=4_194_000 + number, address=f"{address}:50051", metrics_address=f"{address}:9100"
    )
    for number, address in enumerate(ADDRESSES)
}
OPERATION = Operation(
    id="rebalance-of-a-long-name-5f0c11d2", kind=OperationKind.PLACE, arguments=("3/17", *ENDPOINTS),
    phase=OperationPhase.DONE, reason=REASON, detail="", created_s=1.7e9, ended_s=1.7e9 + 123.4,
    added_replicas=1, removed_replicas=1, moved_bytes=123_456_789,
)  # fmt: skip


def tables():
    """The table of every command that prints one, with a string that must not be split and one that may be wrapped."""
    yield actors_table(dict(ENDPOINTS), None), [e.address for e in ENDPOINTS.values()], ""
    yield operations_table([OPERATION]), [OPERATION.id, "2023-11-1", "123.5 MB"], REASON
    replica = Replica(expert=ExpertId(layer=3, index=17), actor="expert-" + "x" * 60, share=0.25)
    preview = PlanPreview(
        policy="share", reason=REASON, balancedness_before=0.5, balancedness_after=0.75, added=(replica,), removed=(),
        changed_shares=0, moved_bytes=1,
    )  # fmt: skip
    yield plan_table(preview), [replica.actor], ""
    described = ModelDescription(
        family="tiny", hidden_size=1, num_layers=1, num_moe_layers=1, num_experts=1, top_k=1, expert_parameters=1,
        total_parameters=671_026_419_200, active_parameters=1,
    )  # fmt: skip
    yield params_table(described), ["671.0 B (671,026,419,200)"], "total parameters"
    yield batch_table(Tally(), 0, 1.0), ["tokens generated"], ""
    wide = make_table("", *(f"policy-{i}" for i in range(12)), prose=("",))
    wide.add_row("balancedness", *(f"0.9{i} (0.9)" for i in range(12)))
    yield wide, ["0.90 (0.9)", "0.911 (0.9)"], ""


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_terminal_of_any_width_shows_everything(case: int, width: int) -> None:
    table, whole, wrapped = list(tables())[case]
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, _environ={})
    show_table(table, console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= width
    for text in whole:
        assert text in output or (len(text) > width - 20 and text in re.sub(r"\s", "", output)), output
    assert all(word in output for word in wrapped.split())


@pytest.mark.parametrize("case", range(6))
def test_on_a_pipe_every_row_is_one_line(case: int, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")  # colors do not turn a pipe into a terminal
    table, whole, wrapped = list(tables())[case]
    show_table(table, make_console())
    output = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in output and wrapped in output
    assert all(text in output for text in whole)
    assert len(output.splitlines()) <= table.row_count + 6  # head, rule, title and caption


def test_long_lines_are_not_wrapped_on_a_pipe(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    for stderr in (False, True):
        make_console(stderr=stderr).print(f"cluster moecluster serves {ADDRESSES}")
    output = capsys.readouterr()
    assert output.out == output.err and output.out.count("\n") == 1

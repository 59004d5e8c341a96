"""scale, drain, place and update, which start operations; operations and explain, which show them."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape

from moecluster.cli.common.cluster_choice import ClusterChoice
from moecluster.cli.common.formatting import (
    operations_table,
    shown_bytes,
    shown_duration,
    shown_moves,
    shown_time,
    to_json,
)
from moecluster.cli.common.live_controller import LiveController
from moecluster.cli.common.tables import make_table, show_table
from moecluster.errors import ConfigError, InvalidMessage, OperationFailed
from moecluster.placement.expert_ids import parse_expert
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.types import Operation, OperationKind, OperationPhase

POLL_S = 0.2


def scale(
    choice: ClusterChoice,
    expert_actors: int | None,
    routers: int | None,
    operation_id: str,
    wait: bool,
    console: Console,
) -> None:
    """Scales to a number of expert actors, or of routers."""
    if (expert_actors is None) == (routers is None):
        raise ConfigError("N: expected a number of expert actors, or --routers with a number of routers instead")
    if expert_actors is not None and expert_actors < 1:
        raise ConfigError(f"N: got {expert_actors}, expected at least 1 expert actor")
    if routers is not None and routers < 1:
        raise ConfigError(f"--routers: got {routers}, expected at least 1 router")
    chosen_id = _with_id(OperationKind.SCALE if routers is None else OperationKind.SCALE_ROUTERS, operation_id)

    def ask(calls: ControllerCalls) -> Operation:
        if routers is not None:
            return calls.scale_routers(routers, operation_id=chosen_id)
        assert expert_actors is not None
        return calls.scale(expert_actors, operation_id=chosen_id)

    _carry_out(choice, ask, wait, console)


def drain(choice: ClusterChoice, node: str, operation_id: str, wait: bool, console: Console) -> None:
    """Drains a node, or one expert actor."""
    chosen_id = _with_id(OperationKind.DRAIN, operation_id)
    _carry_out(choice, lambda calls: calls.drain(node, operation_id=chosen_id), wait, console)


def place(
    choice: ClusterChoice,
    expert: str,
    actors: Sequence[str],
    nowhere: bool,
    operation_id: str,
    wait: bool,
    console: Console,
) -> None:
    """Places an expert on exactly the named actors, or on none."""
    if nowhere == bool(actors):
        raise ConfigError("ACTOR: expected the names of one actor or more, or --nowhere instead of them")
    where = parse_expert(expert, "EXPERT")
    chosen_id = _with_id(OperationKind.PLACE, operation_id)
    _carry_out(choice, lambda calls: calls.place(where, actors, operation_id=chosen_id), wait, console)


def update(choice: ClusterChoice, checkpoint: str, operation_id: str, wait: bool, console: Console) -> Operation:
    """Replaces all weights by those of a directory; returns the operation in its latest state."""
    chosen_id = _with_id(OperationKind.UPDATE, operation_id)
    return _carry_out(choice, lambda calls: calls.update(checkpoint, operation_id=chosen_id), wait, console)


def operations(choice: ClusterChoice, limit: int, as_json: bool, console: Console) -> None:
    """Lists the controller's current and past operations, newest first."""
    with LiveController(choice) as controller:
        found = controller.ask(lambda calls: calls.operations(limit))
    if as_json:
        console.print_json(to_json([dataclasses.asdict(operation) for operation in found]))
    elif found:
        show_table(operations_table(found), console)
    else:
        console.print("no operation yet")


def explain(choice: ClusterChoice, operation_id: str, as_json: bool, console: Console) -> None:
    """Shows an operation's reason, progress and gain."""
    with LiveController(choice) as controller:
        operation = controller.ask(lambda calls: calls.operation(operation_id))
    if as_json:
        console.print_json(to_json(dataclasses.asdict(operation)))
        return
    asked = " ".join((operation.kind, *operation.arguments))
    console.print(f"{operation.id}: {asked}", highlight=False, markup=False)
    table = make_table("", "value", prose=("value",), box=None, show_header=False, pad_edge=False)
    for what, text in (
        ("why", operation.reason),
        ("phase", operation.phase.value),
        ("detail", operation.detail),
        ("begun", shown_time(operation.created_s)),
        ("took", shown_duration(operation)),
        ("moved", shown_moves(operation)),
        ("balancedness", _gain(operation)),
    ):
        if text:
            table.add_row(what, escape(text))
    show_table(table, console)


def _carry_out(
    choice: ClusterChoice, request: Callable[[ControllerCalls], Operation], wait: bool, console: Console
) -> Operation:
    """Starts an operation and, if wait, waits for its end. Raises OperationFailed."""
    with LiveController(choice) as controller:
        try:
            operation = controller.ask(request)
        except InvalidMessage as exc:
            raise ConfigError(str(exc)) from exc
        if wait:
            operation = _see_through(controller, operation, console)
    if operation.phase is OperationPhase.FAILED:
        raise OperationFailed(f"{operation.id}: {operation.detail or 'the controller gives no reason'}")
    if operation.phase.ended:
        line = f"{operation.id} is done after {shown_duration(operation)}: {_outcome(operation)}"
    else:
        line = f"{operation.id} is {operation.phase.value}; moecluster explain {operation.id} says how it goes"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return operation


def _outcome(operation: Operation) -> str:
    if operation.kind is OperationKind.UPDATE:
        return f"{operation.detail}; {shown_bytes(operation.moved_bytes)} of experts loaded"
    if operation.kind is OperationKind.SCALE_ROUTERS:
        return f"routers: {operation.arguments[0]}"
    return shown_moves(operation)


def _see_through(controller: LiveController, operation: Operation, console: Console) -> Operation:
    """Waits for the operation's end and returns it; shows its phase meanwhile."""
    operation_id = operation.id
    try:
        with console.status(_progress(operation)) as shown:
            while not operation.phase.ended:
                time.sleep(POLL_S)
                operation = controller.ask(lambda calls: calls.operation(operation_id))
                shown.update(_progress(operation))
    except KeyboardInterrupt:
        console.print(f"{operation_id} goes on without being waited for", highlight=False, markup=False)
        raise
    return operation


def _progress(operation: Operation) -> str:
    detail = f": {operation.detail}" if operation.detail else ""
    return escape(f"{operation.id} is {operation.phase.value}{detail}")


def _with_id(kind: OperationKind, given: str) -> str:
    """Returns an operation id chosen here, so that a retry after a lost answer starts nothing new."""
    return given or f"{kind}-{secrets.token_hex(4)}"


def _gain(operation: Operation) -> str:
    """Formats balancedness before, predicted and measured, and the measured gain of the predicted one."""
    before = operation.balancedness_before
    predicted = operation.balancedness_predicted
    measured = operation.balancedness_measured
    figures = [
        f"{value:.3f} {word}"
        for value, word in ((before, "before"), (predicted, "predicted"), (measured, "measured"))
        if value is not None
    ]
    if before is not None and predicted is not None and measured is not None:
        figures.append(f"gain {measured - before:+.3f} of {predicted - before:+.3f} predicted")
    return ", ".join(figures)

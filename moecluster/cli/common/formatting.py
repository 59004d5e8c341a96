"""How figures and records are shown."""

import json
from collections.abc import Sequence
from datetime import datetime
from enum import Enum

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from moecluster.cli.common.tables import make_table
from moecluster.types import Operation


def to_json(fields: object) -> str:
    """JSON of dicts, lists, numbers and texts; an enum's member is its value."""

    def value_of(member: object) -> object:
        assert isinstance(member, Enum), member
        return member.value

    return json.dumps(fields, default=value_of)


def shown_bytes(count: float) -> str:
    """Such as 4.1 MB."""
    return decimal(round(count))


def shown_part(part: float, digits: int) -> str:
    """A part of a whole in percent. All and nothing are said only of all and nothing: 0.999999 is >99.99 %."""
    least = 10.0**-digits
    if 0 < 100 * part < least:
        return f"<{least:.{digits}f} %"
    if 100 - least < 100 * part < 100:
        return f">{100 - least:.{digits}f} %"
    return f"{100 * part:.{digits}f} %"


def shown_time(unix_s: float) -> str:
    """Date and time of day, in the user's zone."""
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def shown_moves(operation: Operation) -> str:
    """What an operation moved, in a few words."""
    if not (operation.added_replicas or operation.removed_replicas or operation.moved_bytes):
        return "no replica moved"
    return (
        f"replicas: {operation.added_replicas} added, {operation.removed_replicas} removed; "
        f"{shown_bytes(operation.moved_bytes)} loaded"
    )


def shown_duration(operation: Operation) -> str:
    """How long an operation took; nothing while it goes on."""
    if operation.ended_s is None:
        return ""
    return f"{max(operation.ended_s - operation.created_s, 0.0):.1f} s"


def operations_table(found: Sequence[Operation]) -> Table:
    """A line for each operation."""
    columns = ("operation", "asked", "phase", "begun", "took", "loaded", "why")
    table = make_table(*columns, prose=("asked", "why"), box=None, pad_edge=False)
    for operation in found:
        cells = (
            operation.id,
            " ".join((operation.kind, *operation.arguments)),
            operation.phase.value,
            shown_time(operation.created_s),
            shown_duration(operation),
            shown_bytes(operation.moved_bytes),
            operation.reason,
        )
        table.add_row(*(escape(cell) for cell in cells))
    return table

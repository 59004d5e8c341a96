"""Formats figures and records for display."""

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
    """Returns JSON of dicts, lists, numbers and strings; an enum member becomes its value."""

    def value_of(member: object) -> object:
        assert isinstance(member, Enum), member
        return member.value

    return json.dumps(fields, default=value_of)


def shown_bytes(count: float) -> str:
    """Formats bytes, such as 4.1 MB."""
    return decimal(round(count))


def shown_part(part: float, digits: int) -> str:
    """Formats a fraction as a percentage. Only exact 0 and 1 are shown as 0 and 100 %: 0.999999 becomes >99.99 %."""
    least = 10.0**-digits
    if 0 < 100 * part < least:
        return f"<{least:.{digits}f} %"
    if 100 - least < 100 * part < 100:
        return f">{100 - least:.{digits}f} %"
    return f"{100 * part:.{digits}f} %"


def shown_time(unix_s: float) -> str:
    """Formats date and time of day, in the user's time zone."""
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def shown_moves(operation: Operation) -> str:
    """Summarizes what an operation moved."""
    if not (operation.added_replicas or operation.removed_replicas or operation.moved_bytes):
        return "no replica moved"
    return (
        f"replicas: {operation.added_replicas} added, {operation.removed_replicas} removed; "
        f"{shown_bytes(operation.moved_bytes)} loaded"
    )


def shown_duration(operation: Operation) -> str:
    """Formats how long an operation took; empty while it runs."""
    if operation.ended_s is None:
        return ""
    return f"{max(operation.ended_s - operation.created_s, 0.0):.1f} s"


def operations_table(found: Sequence[Operation]) -> Table:
    """Returns a table with one row per operation."""
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

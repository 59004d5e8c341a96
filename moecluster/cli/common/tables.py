"""Tables that lose nothing: where the terminal is too narrow for the columns, each row becomes a list."""

from collections.abc import Collection
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from moecluster.cli.common.console import UNLIMITED

PROSE_CHARACTERS = 24  # narrower columns of prose are hard to read


def make_table(*columns: str, prose: Collection[str] = (), right: Collection[str] = (), **options: Any) -> Table:
    """Returns a table for show_table. prose: columns that may wrap at words; all others stay in one line.

    right: columns to align right. options: of rich.table.Table.
    """
    return Table(
        *(
            Column(name, overflow="fold", no_wrap=name not in prose, justify="right" if name in right else "left")
            for name in columns
        ),
        **options,
    )


def show_table(table: Table, console: Console) -> None:
    """Prints the table, or its rows as lists where it does not fit."""
    unlimited = console.options.update(width=UNLIMITED)
    for column in table.columns:
        widths = [Measurement.get(console, unlimited, cell) for cell in (column.header, *column.cells)]
        widest = max(width.maximum for width in widths)
        if column.no_wrap:
            column.width = widest
        else:
            column.min_width = min(widest, max(PROSE_CHARACTERS, *(width.minimum for width in widths)))
    if Measurement.get(console, unlimited, table).minimum <= console.width:
        console.print(table)
    else:
        _show_stacked(table, console)


def _show_stacked(table: Table, console: Console) -> None:
    """Prints the first cell of each row, and below it the non-empty others with their column names."""
    first, *others = table.columns
    cells = [list(column.cells) for column in others]
    for row, name in enumerate(first.cells):
        console.print(name, highlight=False)
        below = Table(
            Column(no_wrap=True, overflow="fold"), Column(overflow="fold"), box=None, show_header=False, pad_edge=False
        )
        for column, found in zip(others, cells, strict=True):
            if found[row]:
                below.add_row(f"  {column.header}" if table.show_header else "", found[row])
        if below.row_count:
            console.print(below)
    if table.caption:
        console.print(table.caption)

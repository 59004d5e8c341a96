"""A progress bar while a cluster starts: first a spinner, then the bytes of its experts."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TransferSpeedColumn

from actors.names import OnLoading


@contextmanager
def loading_bar(console: Console, starting: str) -> Iterator[OnLoading]:
    """starting: the text of the spinner. Shows nothing without a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        spinner = progress.add_task(starting, total=None)
        bars: list[TaskID] = []

        def show(loaded_bytes: int, total_bytes: int) -> None:
            if not bars:
                progress.remove_task(spinner)
                bars.append(progress.add_task("loading experts", total=total_bytes))
            progress.update(bars[0], completed=loaded_bytes, total=total_bytes)

        yield show

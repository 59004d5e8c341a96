"""batch: a file of requests through the HTTP front, to a file of answers."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from actors.commands.event_loop import run_until_signalled
from moecluster.errors import ConfigError, DataError, MoeClusterError
from moecluster.serving.http_front import open_front, read_api_key
from moecluster.serving.offline.journal import Journal, Output, is_complete, journal_path
from moecluster.serving.offline.lines import BatchInput
from moecluster.serving.offline.run import run_batch
from moecluster.serving.offline.sending import Retries
from moecluster.serving.offline.tally import Tally

SAID_EVERY_S = 30.0  # where there is no terminal


@dataclass(frozen=True, kw_only=True)
class BatchChoice:
    """How the lines are sent."""

    base_url: str
    cluster: str  # go to this one through a front of our own; empty: to base_url
    api_key_env: str
    concurrency: int
    attempts: int
    patience_s: float
    timeout_s: float


def batch(source: Path, out: Path, choice: BatchChoice, console: Console) -> None:
    """Sends every line of source that is not done yet, and writes out when all are."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f'OUT: got "{out}", expected a file in a folder that is there')
    api_key = "" if choice.cluster else read_api_key(choice.api_key_env)
    tally = Tally()
    with BatchInput(source) as lines:
        if _is_there(out, lines):
            journal_path(out).unlink(missing_ok=True)  # a crash came between the last rename and this
            console.print(f"{out} holds all {len(lines)} answers already; remove it to ask again", soft_wrap=True)
            return
        with Journal(out, lines, on_found=tally.add) as journal:
            found = journal.done
            if found or journal.cut_bytes:
                torn = f", and a torn one of {journal.cut_bytes} bytes is cut off" if journal.cut_bytes else ""
                console.print(f"going on: {found} of {len(lines)} lines are done{torn}", highlight=False)
            began_s = time.monotonic()
            try:
                with _Shown(len(lines), tally, console) as shown:
                    if choice.cluster:
                        _run_through_own_front(lines, journal, choice, shown, console)
                    else:
                        run_until_signalled(_run(lines, journal, choice.base_url, api_key, choice, shown))
            except (MoeClusterError, KeyboardInterrupt, SystemExit):
                kept = f"{journal.done} of {len(lines)} lines are kept in {journal.path}"
                console.print(f"{kept}; the same command goes on behind them", highlight=False, soft_wrap=True)
                raise
            journal.finish()
            console.print(_table(tally, found, time.monotonic() - began_s))
            console.print(f"written to {out}", highlight=False, soft_wrap=True)


def _is_there(out: Path, lines: BatchInput) -> bool:
    """Whether the answers are complete. Raises DataError for a file that is something else."""
    if not out.exists():
        return False
    complete = is_complete(out, lines)
    if not complete:
        raise DataError(f"{out}: is there already, and not the answers to {lines.path}; give another output")
    return True


def _run_through_own_front(
    lines: BatchInput, journal: Journal, choice: BatchChoice, shown: "_Shown", console: Console
) -> None:
    from actors.commands.own_front import front_to  # brings FastAPI and gRPC along

    with front_to(choice.cluster, choice.concurrency, console) as own:
        run_until_signalled(_run(lines, journal, own.url, own.api_key, choice, shown))


async def _run(
    lines: BatchInput, journal: Journal, base_url: str, api_key: str, choice: BatchChoice, shown: "_Shown"
) -> None:
    async with open_front(
        base_url, api_key=api_key, max_connections=choice.concurrency, timeout_s=choice.timeout_s
    ) as front:
        retries = Retries(attempts=choice.attempts, patience_s=choice.patience_s)
        await run_batch(lines, journal, front, concurrency=choice.concurrency, retries=retries, on_done=shown.advance)


class _Shown:
    """How far it is: a bar on a terminal, else a line every SAID_EVERY_S."""

    def __init__(self, total: int, tally: Tally, console: Console) -> None:
        self._total, self._tally, self._console = total, tally, console
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("lines"), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=tally.done)
        self._said_s = time.monotonic()

    def advance(self, output: Output) -> None:
        self._tally.add(output)
        self._bar.advance(self._task)
        if not self._console.is_terminal and time.monotonic() >= self._said_s + SAID_EVERY_S:
            self._said_s = time.monotonic()
            failed = f", {self._tally.failed.total()} of them failed" if self._tally.failed else ""
            self._console.print(f"{self._tally.done} of {self._total} lines are done{failed}", highlight=False)

    def __enter__(self) -> "_Shown":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _table(tally: Tally, found: int, took_s: float) -> Table:
    table = Table("batch", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    now = tally.done - found
    table.add_row("lines", f"{tally.done:,}")
    table.add_row("answered", f"{tally.answered:,}")
    for kind, count in sorted(tally.failed.items()):
        table.add_row(f"failed: {kind}", f"{count:,}")
    table.add_row("prompt tokens", f"{tally.prompt_tokens:,}")
    table.add_row("tokens written", f"{tally.completion_tokens:,}")
    if found:
        table.add_row("of these lines done before", f"{found:,}")
    table.add_row("time", f"{took_s:,.1f} s")
    if now:
        table.add_row("lines a second", f"{now / max(took_s, 1e-9):,.1f}")
    return table

"""batch: sends a file of requests through the HTTP gateway, and writes a file of responses."""

import asyncio
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from actors.places import check_file
from moecluster.cli.common.console import make_console
from moecluster.cli.common.event_loop import run_until_signalled
from moecluster.cli.common.extras import need
from moecluster.cli.common.ray_job import kept_path
from moecluster.cli.common.tables import make_table, show_table
from moecluster.errors import DataError, MoeClusterError
from moecluster.http_client.batch.journal import Journal, Output, is_complete, journal_path
from moecluster.http_client.batch.lines import BatchInput
from moecluster.http_client.batch.run import run_batch
from moecluster.http_client.batch.send import Retries
from moecluster.http_client.batch.tally import Tally
from moecluster.http_client.connection import CONNECT_TIMEOUT_S, open_gateway, read_api_key

REPORT_EVERY_S = 30.0  # without a terminal
WAITING_REPORT_EVERY_S = 60.0
ANSWERS_WITHIN_S = 0.8  # a reachable gateway; otherwise the silence is reported


@dataclass(frozen=True, kw_only=True)
class BatchChoice:
    """How the lines are sent."""

    base_url: str
    cluster: str  # reached through a gateway in this process; empty: use base_url
    api_key_env: str
    concurrency: int
    attempts: int
    patience_s: float
    timeout_s: float


def batch(source: Path, out: Path, choice: BatchChoice, console: Console) -> None:
    """Sends every line of source that is not done yet, and writes out when all are done."""
    if choice.cluster:
        need("serve", "moecluster batch --cluster")
    out = kept_path(out)
    if not os.path.isfile(out):  # an existing file is only read
        check_file("OUT", out)
    api_key = "" if choice.cluster else read_api_key(choice.api_key_env)
    tally = Tally()
    with BatchInput(source) as lines:
        if _is_there(out, lines):
            journal_path(out).unlink(missing_ok=True)  # left by a crash after the output was renamed
            console.print(f"{out} holds all {len(lines)} answers already; remove it to ask again", soft_wrap=True)
            return
        with Journal(out, lines, on_found=tally.add) as journal:
            found = journal.done
            if found or journal.cut_bytes:
                torn = f", and a torn one of {journal.cut_bytes} bytes is cut off" if journal.cut_bytes else ""
                console.print(f"going on: {found} of {len(lines)} lines are done{torn}", highlight=False)
            began_s = time.monotonic()
            try:
                with _Shown(len(lines), tally, choice, console) as shown:
                    if choice.cluster:
                        _run_through_local_gateway(lines, journal, choice, shown, console)
                    else:
                        run_until_signalled(_run(lines, journal, choice.base_url, api_key, choice, shown))
            except (MoeClusterError, KeyboardInterrupt, SystemExit):
                kept = f"{journal.done} of {len(lines)} lines are kept in {journal.path}"
                console.print(f"{kept}; the same command goes on behind them", highlight=False, soft_wrap=True)
                raise
            journal.finish()
            show_table(_table(tally, found, time.monotonic() - began_s), console)
            console.print(f"written to {out}", highlight=False, soft_wrap=True)


def _is_there(out: Path, lines: BatchInput) -> bool:
    """Returns whether the responses are complete. Raises DataError for a file that is something else."""
    if not out.exists():
        return False
    complete = is_complete(out, lines)
    if not complete:
        raise DataError(f"{out}: is there already, and not the answers to {lines.path}; give another output")
    return True


def _run_through_local_gateway(
    lines: BatchInput, journal: Journal, choice: BatchChoice, shown: "_Shown", console: Console
) -> None:
    from moecluster.cli.common.local_gateway import local_gateway_to  # imports FastAPI and gRPC

    with local_gateway_to(choice.cluster, choice.concurrency, console) as own:
        run_until_signalled(_run(lines, journal, own.url, own.api_key, choice, shown))


async def _run(
    lines: BatchInput, journal: Journal, base_url: str, api_key: str, choice: BatchChoice, shown: "_Shown"
) -> None:
    async with open_gateway(
        base_url, api_key=api_key, max_connections=choice.concurrency, timeout_s=choice.timeout_s
    ) as gateway:
        retries = Retries(attempts=choice.attempts, patience_s=choice.patience_s)
        asking = asyncio.create_task(_report_silence(base_url, shown))
        try:
            await run_batch(
                lines,
                journal,
                gateway,
                concurrency=choice.concurrency,
                retries=retries,
                on_done=shown.advance,
                on_refused=shown.refused,
            )
        finally:
            asking.cancel()


async def _report_silence(base_url: str, shown: "_Shown") -> None:
    """Reports a gateway that does not answer: a missing host refuses no connection, but stays silent for long."""
    async with open_gateway(base_url, api_key="", max_connections=1, timeout_s=CONNECT_TIMEOUT_S) as gateway:
        try:
            await asyncio.wait_for(gateway.get("/health"), ANSWERS_WITHIN_S)
        except TimeoutError:
            shown.refused("no answer yet")
        except httpx.RequestError:
            pass  # the first line will fail, too


class _Shown:
    """Shows progress: a bar on a terminal, else a line every REPORT_EVERY_S; and that the gateway is waited for."""

    def __init__(self, total: int, tally: Tally, choice: BatchChoice, console: Console) -> None:
        self._total, self._tally, self._choice, self._console = total, tally, choice, console
        self._waiting_reported_s = -math.inf
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("lines"), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=tally.done)
        self._said_s = time.monotonic()

    def advance(self, output: Output) -> None:
        self._tally.add(output)
        self._bar.advance(self._task)
        if not self._console.is_terminal and time.monotonic() >= self._said_s + REPORT_EVERY_S:
            self._said_s = time.monotonic()
            failed = f", {self._tally.failed.total()} of them failed" if self._tally.failed else ""
            self._console.print(f"{self._tally.done} of {self._total} lines are done{failed}", highlight=False)

    def refused(self, why: str) -> None:
        """Reports that the gateway takes no requests: at once, then every WAITING_REPORT_EVERY_S."""
        if time.monotonic() < self._waiting_reported_s + WAITING_REPORT_EVERY_S:
            return
        self._waiting_reported_s = time.monotonic()
        choice = self._choice
        gateway = f"the cluster {choice.cluster}" if choice.cluster else f"the gateway at {choice.base_url}"
        message = f"{gateway} takes no requests ({why}); waiting for it, up to {choice.patience_s:g} s; Ctrl-C ends it"
        # Above the bar, if there is one.
        console = self._console if self._console.is_terminal else make_console(stderr=True)
        console.print(message, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> "_Shown":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _table(tally: Tally, found: int, took_s: float) -> Table:
    table = make_table("batch", "", prose=("batch",), right=("",), box=None, pad_edge=False)
    now = tally.done - found
    table.add_row("lines", f"{tally.done:,}")
    table.add_row("answered", f"{tally.answered:,}")
    for kind, count in sorted(tally.failed.items()):
        table.add_row(f"failed: {kind}", f"{count:,}")
    table.add_row("prompt tokens", f"{tally.prompt_tokens:,}")
    table.add_row("tokens generated", f"{tally.completion_tokens:,}")
    if found:
        table.add_row("of these lines done before", f"{found:,}")
    table.add_row("time", f"{took_s:,.1f} s")
    if now:
        table.add_row("lines a second", f"{now / max(took_s, 1e-9):,.1f}")
    return table

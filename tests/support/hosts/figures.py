"""What the tests on three hosts have measured, as a report like a benchmark's: benchmarks/results/hosts.json."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from benchmarks.report import Report, Row, installed_versions
from tests.support.soak.http_load import StreamedRequest


class HostFigures:
    """Rows that the tests add one after another."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds how long the block took; nothing if it fails."""
        began_s = time.monotonic()
        yield
        self.add(what, time.monotonic() - began_s, "s")

    def add(self, what: str, value: float, unit: str, *, target: float | None = None) -> None:
        """Adds a figure that was measured once; lower is better."""
        self.rows.append(Row(name=what, runs=[value], unit=unit, target=target, better="lower"))

    def add_requests(self, when: str, texts: Sequence[StreamedRequest]) -> None:
        """Adds requests that were all checked."""
        self.add(f"{when}: requests", len(texts), "requests")
        self.add(f"{when}: failed or wrong", 0, "requests", target=0)
        self.add(f"{when}: slowest request", max(text.ended_s - text.started_s for text in texts), "s")

    def write(self) -> None:
        """Prints and writes the report."""
        report = Report(name="hosts", rows=self.rows, raw={}, versions=installed_versions())
        report.print(Console())
        print(f"written to {report.write()}")

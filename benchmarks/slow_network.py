"""Measures what a slow and lossy network between hosts costs: the same model, on three hosts, without and with 200 ms
of delay and 5 % loss on what leaves each host (the round trip of a message takes twice the delay).

Three network namespaces with sshd, brought up by `ray up` as in tests/hosts; clients that stream requests over HTTP.
Every answer is checked, and none may fail. Where the kernel lacks netem, a program in between delays and loses frames
instead (tests/support/hosts/slow_link.py); `raw` says which. Needs root.

    python -m benchmarks.slow_network
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.report import MIN_RUNS, Report, Row, installed_versions
from tests.support.hosts.lab import HostLab, why_not
from tests.support.hosts.ray_up import RayOnHosts
from tests.support.hosts.serving_job import NEW_TOKENS, ServingJob, serve_on
from tests.support.soak.http_load import StreamedRequest

DELAY_MS, LOSS_PERCENT = 200, 5.0
CLIENTS = 4
GOOD_S, SLOW_S = 6.0, 30.0  # of each run; requests that have begun by then are waited for


@dataclass(frozen=True, kw_only=True)
class Run:
    """What clients saw during one run."""

    texts: Sequence[StreamedRequest]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(text.tokens for text in self.texts) / self.seconds

    @property
    def first_s(self) -> float:
        """Median time to first token."""
        return statistics.median(text.chunks_s[0] - text.started_s for text in self.texts)

    @property
    def between_s(self) -> float:
        """Median time per further token, by request: a chunk may hold several."""
        return statistics.median(
            (text.chunks_s[-1] - text.chunks_s[0]) / (text.tokens - 1) for text in self.texts if text.tokens > 1
        )


def main() -> None:
    if reason := why_not():
        sys.exit(f"slow_network: {reason}")
    torch.set_num_threads(1)
    good, slow = [], []
    with tempfile.TemporaryDirectory() as folder, HostLab(Path(folder) / "lab") as lab:
        hosts = RayOnHosts(lab)
        hosts.up()
        serving = serve_on(hosts, Path(folder))
        for _ in range(MIN_RUNS):
            good.append(measured(serving, GOOD_S))
            by = lab.slow_down(delay_ms=DELAY_MS, loss_percent=LOSS_PERCENT)
            slow.append(measured(serving, SLOW_S))
            lab.speed_up()
        experts, nodes = serving.experts(), len(hosts.nodes())
        hosts.down()
    report = Report(
        name="slow_network",
        rows=rows(good, slow),
        raw={
            "network": {"delay_ms": DELAY_MS, "loss_percent": LOSS_PERCENT, "by": by},
            "clients": CLIENTS,
            "new_tokens": NEW_TOKENS,
            "requests": {"good": sum(len(run.texts) for run in good), "slow": sum(len(run.texts) for run in slow)},
            "experts_by_host": experts,
            "hosts_in_the_end": nodes,
        },
        versions=installed_versions(),
    )
    report.print(Console())
    print(f"written to {report.write()}")


def measured(serving: ServingJob, duration_s: float) -> Run:
    """Runs the clients for a time. Asserts that no request failed, and that every answer is the expected one."""
    began_s = time.monotonic()
    with serving.clients(CLIENTS) as clients:
        time.sleep(duration_s)
    run = Run(texts=clients.texts, seconds=time.monotonic() - began_s)
    serving.check(run.texts)
    return run


def rows(good: Sequence[Run], slow: Sequence[Run]) -> list[Row]:
    """Returns figures of both networks, and their ratios."""
    found = [Row(name="failed or wrong requests", runs=[0.0] * len(slow), unit="requests", target=0, better="lower")]
    for name, runs in (("good network", good), ("slow network", slow)):
        found += [
            Row(name=f"{name}: throughput", runs=[run.tokens_per_s for run in runs], unit="tokens/s"),
            Row(name=f"{name}: time to first token", runs=[run.first_s for run in runs], unit="s", better="lower"),
            Row(name=f"{name}: time per token", runs=[run.between_s for run in runs], unit="s", better="lower"),
        ]
    pairs = list(zip(good, slow, strict=True))
    return [
        *found,
        Row(
            name="slow network: time per token, in round trips",
            runs=[run.between_s / (2 * DELAY_MS / 1000) for run in slow],
            unit="round trips",
            better="lower",
        ),
        Row(
            name="slow against good: throughput",
            runs=[after.tokens_per_s / before.tokens_per_s for before, after in pairs],
            unit="x",
        ),
    ]


if __name__ == "__main__":
    main()

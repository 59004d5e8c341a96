"""What the metrics cost: the page of each process at 58 layers x 256 experts, and serving with them on against off.

On and off are the same process, one after the other in turns: a router and two expert actors over gRPC, built with a
`Metrics` each, scraped once a run, or without. Beside the ratio, which is noisy, the time that is spent inside the
metrics' own methods is measured.

    python -m benchmarks.metrics
"""

import argparse
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from prometheus_client import disable_created_metrics
from rich.console import Console

from benchmarks.report import MIN_RUNS, Report, Row, installed_versions
from benchmarks.serving_model import save_mixtral
from moecluster.generation import GenerationRequest
from moecluster.hf.continuous_batching import silence_batch_log
from moecluster.metrics import Metrics
from moecluster.router.engine.engine import EngineLimits
from moecluster.router.router import Router
from moecluster.rpc.metrics_server import MetricsServer
from moecluster.rpc.tensors import expect_read_only_views
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.clusters.given import any_directory
from tests.support.every_metric import (
    set_all_of_a_controller,
    set_all_of_a_router,
    set_all_of_an_expert_actor,
)

LAYERS, EXPERTS, ACTORS = 58, 256, 64
NAMES = tuple(f"expert-{i}" for i in range(ACTORS))
SCRAPES = 20
TIMEOUT_S = 60.0
MAX_PAGE_S, MAX_PAGE_MB, MIN_RATIO, MAX_SHARE = 0.05, 1.0, 0.99, 0.01
MODEL_LAYERS = 2
CONCURRENCY, NEW_TOKENS = 16, 32

SetUp = Callable[[Metrics], None]
PAGES: dict[str, SetUp] = {
    "router": lambda m: set_all_of_a_router(m, layers=LAYERS, experts=EXPERTS, actors=NAMES),
    "controller": lambda m: set_all_of_a_controller(m, layers=LAYERS, experts=EXPERTS, actors=NAMES),
    "expert actor": lambda m: set_all_of_an_expert_actor(m, layers=LAYERS, experts=EXPERTS, held=EXPERTS * 3 // 128),
}


def page_rows() -> Iterator[Row]:
    """Scrapes each kind of page by HTTP."""
    for process, set_up in PAGES.items():
        metrics = Metrics(model="model", cluster="cluster")
        set_up(metrics)
        with closing(MetricsServer(metrics, credentials=None)) as server:
            url, seconds, size_mb = f"http://{server.address}/metrics", [], 0.0
            for _ in range(SCRAPES):
                began_s = time.perf_counter()
                with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                    size_mb = len(answer.read()) / 1e6
                seconds.append(time.perf_counter() - began_s)
        of = f"/metrics of a {process}, {LAYERS} x {EXPERTS}"
        yield Row(name=f"{of}: time", runs=seconds, unit="s", target=MAX_PAGE_S, better="lower")
        yield Row(name=f"{of}: size", runs=[size_mb], unit="MB", target=MAX_PAGE_MB, better="lower")


class Timed:
    """A Metrics that adds up the time spent in its methods."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._metrics, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> None:
            began_s = time.thread_time()
            found(*arguments, **options)
            took_s = time.thread_time() - began_s
            with self._lock:
                self.seconds += took_s

        return call


class Serving:
    """A router over two expert actors, all in this process."""

    def __init__(self, directory: str, make: Callable[[], Metrics | None]) -> None:
        """make: the metrics of each process."""
        self.metrics: list[Metrics] = []

        def metrics_of(process: str) -> Metrics | None:
            made = make()
            self.metrics += [made] if made is not None else []
            return made

        self._cluster = ExpertCluster(directory, transport="shm", dtype="bfloat16", metrics_of=metrics_of)
        self._router = Router(
            directory,
            self._cluster.remote,
            limits=EngineLimits(max_running=CONCURRENCY),
            is_given=any_directory,
            dtype=torch.bfloat16,
            metrics=self.metrics[-1] if self.metrics else None,
        )

    def tokens_per_s(self) -> float:
        """Generates for all requests at once, with one scrape of every page meanwhile."""
        threads = [threading.Thread(target=self._generate, args=(i,)) for i in range(CONCURRENCY)]
        began_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for metrics in self.metrics:
            metrics.render()
        for thread in threads:
            thread.join()
        return CONCURRENCY * NEW_TOKENS / (time.perf_counter() - began_s)

    def _generate(self, i: int) -> None:
        ids = tuple(32 + (7 * i + j) % 90 for j in range(16 + i))
        request = GenerationRequest(
            request_id=uuid.uuid4().hex, prompt_ids=ids, max_new_tokens=NEW_TOKENS, ignore_eos=True
        )
        assert sum(len(chunk.ids) for chunk in self._router.generate(request)) == NEW_TOKENS

    def close(self) -> None:
        """Ends it."""
        self._router.close()
        self._cluster.close()


@contextmanager
def serving(directory: str, make: Callable[[], Metrics | None]) -> Iterator[Serving]:
    with closing(Serving(directory, make)) as started:
        started.tokens_per_s()  # warms up
        yield started


def cost_rows(directory: str, runs: int) -> Sequence[Row]:
    """Serves with metrics and without, in turns."""
    with ExitStack() as stack:
        on = stack.enter_context(serving(directory, lambda: Metrics(model="model", cluster="cluster")))
        off = stack.enter_context(serving(directory, lambda: None))
        timed = stack.enter_context(
            serving(directory, lambda: cast(Metrics, Timed(Metrics(model="model", cluster="cluster"))))
        )
        with_metrics, without, shares = [], [], []
        for i in range(runs):
            pair = (on, off) if i % 2 else (off, on)
            found = {each: each.tokens_per_s() for each in pair}
            with_metrics.append(found[on])
            without.append(found[off])
            timers = cast(list[Timed], timed.metrics)
            before_s = sum(each.seconds for each in timers)
            seconds = CONCURRENCY * NEW_TOKENS / timed.tokens_per_s()
            shares.append((sum(each.seconds for each in timers) - before_s) / seconds)
    ratios = [one / other for one, other in zip(with_metrics, without, strict=True)]
    return (
        Row(name="throughput with metrics / without", runs=ratios, unit="", target=MIN_RATIO),
        Row(
            name="time inside the metrics / time of serving",
            runs=shares,
            unit="",
            target=MAX_SHARE,
            better="lower",
        ),
        Row(name="throughput with metrics", runs=with_metrics, unit="tokens/s"),
        Row(name="throughput without metrics", runs=without, unit="tokens/s"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11, help=f"of each; at least {MIN_RUNS}")
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    disable_created_metrics()
    silence_batch_log()
    expect_read_only_views()
    rows = list(page_rows())
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_mixtral(directory, num_layers=MODEL_LAYERS)
        rows += cost_rows(str(directory), max(arguments.runs, MIN_RUNS))
    report = Report(
        name="metrics", rows=rows, raw={row.name: list(row.runs) for row in rows}, versions=installed_versions()
    )
    report.print(Console())
    if not arguments.dry:
        report.write()


if __name__ == "__main__":
    main()

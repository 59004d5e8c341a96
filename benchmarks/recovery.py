"""Measures how the death of an expert actor affects requests: real Ray actors, SIGKILL, one request after another.

With a replica of every expert on another actor, a request in flight fails over: the result is how much longer the
slowest request took than the median. Without replicas, requests wait until Ray has restarted the actor and its experts
are loaded: the results are the longest wait of a request, and the time from the kill to full service.

    python -m benchmarks.recovery
"""

import logging
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
import torch
from rich.console import Console

from actors.driver import Cluster
from actors.names import process_environment
from benchmarks.cluster_under_test import Contender, save_model, started
from benchmarks.report import MIN_RUNS, Report, Row, installed_versions

NUM_EXPERTS = 8
HIDDEN_SIZE = 256
INNER_SIZE = 512
TOKENS = 16
TOP_K = 2
KILLS = 7
SETTLE_S = 3.0  # between full service and the next kill
SERVED_TIMEOUT_S = 60.0
EVERYWHERE = {"expert-0": ["*/*"], "expert-1": ["*/*"]}

assert KILLS >= MIN_RUNS


class Requests:
    """Sends one request after another in a thread, and records when each began and ended."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        generator = torch.Generator().manual_seed(0)
        self._x_TD = torch.randn(TOKENS, HIDDEN_SIZE, generator=generator)
        self._ids_TK = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
        self._weights_TK = torch.rand(TOKENS, TOP_K, generator=generator)
        self.spans_s: list[tuple[float, float]] = []
        self.failures: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._ended.is_set():
            began_s = time.perf_counter()
            try:
                with torch.inference_mode():
                    self._contender.remote(0, self._x_TD, self._ids_TK, self._weights_TK)
            except Exception as exc:
                self.failures.append(repr(exc))
            self.spans_s.append((began_s, time.perf_counter()))
            time.sleep(0.002)

    def __enter__(self) -> "Requests":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(SERVED_TIMEOUT_S)


def main() -> None:
    os.environ.update(process_environment(1))
    torch.set_num_threads(1)
    console = Console()
    with tempfile.TemporaryDirectory() as directory, ray_running():
        save_model(
            Path(directory), num_experts=NUM_EXPERTS, hidden_size=HIDDEN_SIZE, inner_size=INNER_SIZE, top_k=TOP_K
        )
        with started(
            "replicated", directory, {"controller": {"policy": "static", "placement": EVERYWHERE}}
        ) as contender:
            blips_s, medians_s, failed = kills_with_replicas(contender)
        with started("alone", directory, {"controller": {"policy": "static"}}) as contender:
            answers_s, services_s, failed_alone = kills_without(contender)
    failures = [float(failed + failed_alone)] * MIN_RUNS
    rows = [
        Row(
            name="replica elsewhere: added to the slowest request",
            runs=[1e3 * s for s in blips_s],
            unit="ms",
            target=50.0,
            better="lower",
        ),
        Row(name="replica elsewhere: the usual request", runs=[1e3 * s for s in medians_s], unit="ms"),
        Row(name="no replica: from the kill to full service", runs=services_s, unit="s", target=6.0, better="lower"),
        Row(name="no replica: the request that waited longest", runs=answers_s, unit="s"),
        Row(name="requests that failed", runs=failures, unit="", target=0.0, better="lower"),
    ]
    raw = f"{KILLS} kills each; {NUM_EXPERTS} experts of {HIDDEN_SIZE} x {INNER_SIZE}, {TOKENS} tokens a request"
    report = Report(name="recovery", rows=rows, raw=raw, versions=installed_versions())
    report.print(console)
    console.print(f"written to {report.write()}")


def kills_with_replicas(contender: Contender) -> tuple[list[float], list[float], int]:
    """Returns per kill how much longer the slowest request took than the median, per kill the median, and the number of
    failed requests."""
    blips_s, medians_s = [], []
    with Requests(contender) as requests:
        for _ in range(KILLS):
            time.sleep(SETTLE_S)
            killed_s = kill_expert(contender.driver)
            time.sleep(1.0)
            took_s = [end - begin for begin, end in list(requests.spans_s) if end >= killed_s]
            usual_s = statistics.median(end - begin for begin, end in list(requests.spans_s) if end < killed_s)
            blips_s.append(max(took_s) - usual_s)
            medians_s.append(usual_s)
            wait_served(contender)
    return blips_s, medians_s, len(requests.failures)


def kills_without(contender: Contender) -> tuple[list[float], list[float], int]:
    """Returns per kill the longest request, per kill the time to full service, and the number of failed requests."""
    answers_s, services_s = [], []
    with Requests(contender) as requests:
        for _ in range(KILLS):
            time.sleep(SETTLE_S)
            killed_s = kill_expert(contender.driver)
            services_s.append(wait_served(contender) - killed_s)
            time.sleep(0.5)
            answers_s.append(max(end - begin for begin, end in list(requests.spans_s) if end >= killed_s))
    return answers_s, services_s, len(requests.failures)


def kill_expert(driver: Cluster) -> float:
    """Sends SIGKILL to expert-1. Returns the time of the kill."""
    reached = driver.endpoints(names=["expert-1"])["expert-1"]
    assert reached is not None
    os.kill(reached.pid, signal.SIGKILL)
    return time.perf_counter()


def wait_served(contender: Contender) -> float:
    """Waits until the placement has lost expert-1 and has it again. Returns the time of that."""
    deadline_s = time.perf_counter() + SERVED_TIMEOUT_S
    for wanted in (False, True):
        while ("expert-1" in contender.placements.current(1.0).actors) is not wanted:
            if time.perf_counter() > deadline_s:
                raise TimeoutError(f"expert-1 was not served again within {SERVED_TIMEOUT_S:g} s")
            contender.placements.newer_than(contender.placements.current(1.0).number, 0.5)
    return time.perf_counter()


@contextmanager
def ray_running() -> Iterator[None]:
    with ExitStack() as stack:
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.FATAL)
        stack.callback(ray.shutdown)
        yield


if __name__ == "__main__":
    main()

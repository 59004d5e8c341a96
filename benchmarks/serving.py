"""Compares serving throughput with transformers' continuous batching in one process, on the same cores, in turns.

A Mixtral-shaped checkpoint with random weights (2.2 GB, bfloat16); 32 concurrent requests in a closed loop.
Ours: a router with one thread per core, one single-thread expert actor per core, real Ray, over gRPC.
Theirs: one process with one thread per core, with the fastest of its experts implementations.

    python -m benchmarks.serving
"""

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console

from actors.driver import Cluster
from actors.names import process_environment
from benchmarks.measure import ROOT
from benchmarks.report import MIN_RUNS, Report, Row, installed_versions
from benchmarks.serving_model import save_mixtral
from moecluster.config import read_config
from moecluster.generation import GenerationRequest
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.messages import encode_generation_request
from moecluster.rpc.server import open_channel

CONCURRENCY = 32
NUM_REQUESTS = 64  # requests per run
NEW_TOKENS = 32
PROMPT_TOKENS = (16, 112)
WORKER = "benchmarks.workers.transformers_serving"
IMPLEMENTATIONS = ("grouped_mm", "eager")  # batched_mm copies an expert for every row: gigabytes per prompt
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class Run:
    """The timings of one closed-loop run."""

    seconds: float
    first_s: Sequence[float]  # time to first token of each request
    between_s: Sequence[float]  # inter-token latencies
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def make_prompts(seed: int, count: int) -> list[list[int]]:
    """Returns prompts of printable bytes, which are also token ids."""
    choose = random.Random(seed)
    return [[choose.randrange(32, 127) for _ in range(choose.randrange(*PROMPT_TOKENS))] for _ in range(count)]


class InProcess:
    """transformers in a process of its own, which blocks on standard input while ours is measured."""

    def __init__(self, directory: str, implementation: str) -> None:
        self.implementation = implementation
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, directory, implementation, str(CONCURRENCY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(CORES)},
        )

    def run(self, prompts: list[list[int]]) -> Run:
        order = {"prompts": prompts, "new_tokens": NEW_TOKENS, "concurrency": CONCURRENCY}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return Run(**answer, tokens=len(prompts) * NEW_TOKENS)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Ours:
    """A cluster, reached through its router's gRPC port."""

    def __init__(self, address: str, credentials: ClusterCredentials) -> None:
        self._address, self._credentials = address, credentials

    def run(self, prompts: list[list[int]]) -> Run:
        waiting, first, between = list(reversed(prompts)), [], []  # type: list[list[int]], list[float], list[float]
        lock = threading.Lock()

        def work(stub: RouterServiceStub) -> None:
            while True:
                with lock:
                    if not waiting:
                        return
                    prompt = tuple(waiting.pop())
                request = GenerationRequest(
                    request_id=uuid.uuid4().hex, prompt_ids=prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True
                )
                last_s, times = time.perf_counter(), []
                for _ in stub.Generate(encode_generation_request(request)):
                    now_s = time.perf_counter()
                    times.append(now_s - last_s)
                    last_s = now_s
                with lock:
                    first.append(times[0])
                    between.extend(times[1:NEW_TOKENS])

        start_s = time.perf_counter()
        with open_channel(self._address, self._credentials) as channel:
            stub = RouterServiceStub(channel)
            threads = [threading.Thread(target=work, args=(stub,)) for _ in range(CONCURRENCY)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        seconds = time.perf_counter() - start_s
        assert len(first) == len(prompts)
        return Run(seconds=seconds, first_s=first, between_s=between, tokens=len(prompts) * NEW_TOKENS)


@contextmanager
def ours_running(directory: str) -> Iterator[Ours]:
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.FATAL)
    config = read_config(
        {
            "cluster": {"name": "bench-serving", "num_expert_actors": CORES},
            "model": {"dtype": "bfloat16"},
            "router": {"threads": CORES},
            "controller": {"policy": "static"},
            "serve": {"max_running": CONCURRENCY},
        }
    )
    driver, credentials = Cluster(config.cluster.name), ClusterCredentials.make()
    try:
        driver.start(config, directory, credentials=credentials)
        yield Ours(driver.router_address(), credentials)
    finally:
        driver.stop()
        ray.shutdown()


def fastest(directory: str, console: Console) -> InProcess:
    """Returns a process with the experts implementation that generates fastest in a short run."""
    found: dict[str, float] = {}
    for implementation in IMPLEMENTATIONS:
        process = InProcess(directory, implementation)
        process.run(make_prompts(1, CONCURRENCY))  # warm
        found[implementation] = process.run(make_prompts(2, CONCURRENCY)).tokens_per_s
        process.close()
    best = max(found, key=lambda name: found[name])
    console.print(f"in process, tokens/s: {', '.join(f'{name} {rate:.0f}' for name, rate in found.items())}")
    return InProcess(directory, best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=MIN_RUNS)
    parser.add_argument("--model", help="a checkpoint that was written before")
    arguments = parser.parse_args()
    os.environ.update(process_environment(1))
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.model or folder
        if not arguments.model:
            save_mixtral(Path(directory))
        theirs = fastest(directory, console)
        try:
            theirs.run(make_prompts(1, CONCURRENCY))
            with ours_running(directory) as ours:
                ours.run(make_prompts(1, CONCURRENCY))
                pairs = []
                for turn in range(arguments.runs):
                    prompts = make_prompts(100 + turn, NUM_REQUESTS)
                    pairs.append((ours.run(prompts), theirs.run(prompts)))
                    console.print(f"run {turn}: ours {pairs[-1][0].tokens_per_s:.1f} tokens/s, in process "
                                  f"{pairs[-1][1].tokens_per_s:.1f}")  # fmt: skip
        finally:
            theirs.close()
    report = Report(
        name="serving",
        rows=rows_of(pairs),
        raw={
            "model": f"2.2 GB bfloat16, {CONCURRENCY} at a time, {NUM_REQUESTS} requests of {NEW_TOKENS} tokens a run",
            "in_process": theirs.implementation,
        },
        versions=installed_versions(),
    )
    report.print(console)
    if arguments.runs >= MIN_RUNS:
        console.print(f"written to {report.write()}")


def rows_of(pairs: Sequence[tuple[Run, Run]]) -> list[Row]:
    rows = [
        Row(
            name="throughput, ours / in process",
            runs=[ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs],
            unit="x",
            target=0.85,
        )
    ]
    for index, name in enumerate(("ours", "in process")):
        runs = [pair[index] for pair in pairs]
        rows.append(Row(name=f"throughput, {name}", runs=[run.tokens_per_s for run in runs], unit="tokens/s"))
        for what, field in (("first token", "first_s"), ("between tokens", "between_s")):
            for quantile in (50, 99):
                figures = [1e3 * float(np.percentile(getattr(run, field), quantile)) for run in runs]
                rows.append(Row(name=f"{what} p{quantile}, {name}", runs=figures, unit="ms", better="lower"))
    assert all(statistics.median(row.runs) > 0 for row in rows)
    return rows


if __name__ == "__main__":
    main()

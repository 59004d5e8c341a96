"""Measures the throughput gain of live rebalancing: two single-thread expert actors, Zipf 1.2 traffic over 16 experts.

Two clusters run side by side, each with the hot half of the experts on one actor. One keeps that placement (`static`),
the other follows the load (`share`). Both get the same batches, in turns; the other cluster is idle meanwhile.

    python -m benchmarks.live_balance
"""

import itertools
import logging
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from rich.console import Console

from actors.names import process_environment
from benchmarks.cluster_under_test import Contender, save_model, started
from benchmarks.report import MIN_RUNS, Report, Row, installed_versions
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.types import Operation

NUM_EXPERTS = 16
ZIPF_S = 1.2
HIDDEN_SIZE = 512
INNER_SIZE = 4096
TOKENS = 8192  # per batch; each goes to one expert
NUM_BATCHES = 8
WARM_UP_S = 15.0  # lets the controller settle on a placement
TURN_S = 8.0
TURNS = 5
TARGET = 1.6

assert TURNS >= MIN_RUNS


@dataclass(frozen=True, kw_only=True)
class Batch:
    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


def main() -> None:
    os.environ.update(process_environment(1))
    torch.set_num_threads(1)
    console = Console()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        save_model(Path(directory), num_experts=NUM_EXPERTS, hidden_size=HIDDEN_SIZE, inner_size=INNER_SIZE, top_k=1)
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.FATAL)
        stack.callback(ray.shutdown)
        contenders = [stack.enter_context(started(p, directory, settings(p))) for p in ("static", "share")]
        batches = make_batches()
        for contender in contenders:
            throughput(contender, batches, WARM_UP_S)
        runs: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for _ in range(TURNS):
            for contender in contenders:
                runs[contender.name].append(throughput(contender, batches, TURN_S))
        operations = {c.name: operations_of(c) for c in contenders}
    hot_share = float(zipf()[: NUM_EXPERTS // 2].sum())
    rows = [
        Row(name="static: hot experts on one actor", runs=runs["static"], unit="tokens/s"),
        Row(name="share: the controller follows the load", runs=runs["share"], unit="tokens/s"),
        Row(
            name="share / static",
            runs=[share / static for share, static in zip(runs["share"], runs["static"], strict=True)],
            unit="x",
            target=TARGET,
        ),
        Row(name="ceiling: perfect balance, no cost of its own", runs=[hot_share / 0.5] * MIN_RUNS, unit="x"),
    ]
    raw = {
        "operations": {
            policy: [f"{o.id} {o.phase.value}: {o.reason}; {o.moved_bytes} bytes" for o in found]
            for policy, found in operations.items()
        },
        "settings": (
            f"{NUM_EXPERTS} experts of {HIDDEN_SIZE} x {INNER_SIZE}, {TOKENS} tokens a batch, one expert each, bf16"
        ),
    }
    report = Report(name="live_balance", rows=rows, raw=raw, versions=installed_versions())
    report.print(console)
    console.print(f"written to {report.write()}")


def settings(policy: str) -> dict[str, dict[str, Any]]:
    """Returns the cluster's settings. The default contiguous placement puts the hot experts, 0 to 7, on one actor."""
    return {
        "model": {"dtype": "bfloat16"},
        "controller": {"policy": policy, "num_redundant_experts": 8, "period_s": 1.0, "window_s": 10.0},
    }


def zipf() -> npt.NDArray[np.float64]:
    """Returns each expert's fraction of the traffic: [E], descending."""
    weights_E = np.arange(1, NUM_EXPERTS + 1, dtype=np.float64) ** -ZIPF_S
    share_E: npt.NDArray[np.float64] = weights_E / weights_E.sum()
    return share_E


def make_batches() -> list[Batch]:
    """Returns batches whose tokens' experts are drawn from the Zipf law."""
    drawn = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            x_TD=torch.randn(TOKENS, HIDDEN_SIZE, generator=generator, dtype=torch.bfloat16),
            ids_TK=torch.from_numpy(drawn.choice(NUM_EXPERTS, size=(TOKENS, 1), p=zipf())),
            weights_TK=torch.ones(TOKENS, 1),
        )
        for _ in range(NUM_BATCHES)
    ]


def throughput(contender: Contender, batches: list[Batch], seconds: float) -> float:
    """Returns tokens per second through the cluster. A failed request ends the benchmark."""
    began_s, tokens = time.perf_counter(), 0
    for batch in itertools.cycle(batches):
        with torch.inference_mode():
            contender.remote(0, batch.x_TD, batch.ids_TK, batch.weights_TK)
        tokens += TOKENS
        if time.perf_counter() - began_s >= seconds:
            break
    return tokens / (time.perf_counter() - began_s)


def operations_of(contender: Contender) -> tuple[Operation, ...]:
    """Returns the operations of the cluster's controller, newest first."""
    with ControllerCalls(contender.driver.controller_address(), credentials=contender.driver.credentials()) as calls:
        assert calls.status().policy == contender.name
        return calls.operations()


if __name__ == "__main__":
    main()

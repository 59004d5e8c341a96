"""One expert actor of a small model of the native family, and batches for it."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from moecluster.errors import MoeClusterError
from moecluster.expert import compute
from moecluster.expert.service import ExpertService
from moecluster.models.experts.source import ExpertSource
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.expert.in_process import InProcessTransport
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.server import RunningServer
from moecluster.types import ActorAddress, ComputeBatch, ComputeResult, ExpertId, OptimizerSettings, Phase, StepTag
from tests.support.clusters.given import any_directory
from tests.support.expert.batches import make_batch
from tests.support.models.families import make_model, save
from tests.support.waiting import wait_until

LAYER, WIDTH = 1, 32  # of the only MoE layer
EXPERTS = tuple(ExpertId(layer=LAYER, index=index) for index in range(4))
SGD = OptimizerSettings(name="sgd")
TAG = StepTag(term=1, step=1, attempt=0)
TIMEOUT_S = 60.0
SEGMENT_BYTES = 2**20
TRANSPORTS = ("inline", "shm")


def save_small_model(directory: Path) -> Path:
    save(make_model("moecluster"), directory, "per-expert")
    return directory


def load_modules(checkpoint: Path) -> dict[int, nn.Module]:
    """Returns the checkpoint's experts as modules in this process, by index."""
    source = ExpertSource(checkpoint)
    return {expert.index: source.load(expert) for expert in EXPERTS}


Connect = Callable[..., GrpcExpertTransport]  # open_stream, without the address


@contextmanager
def serving(checkpoint: Path, name: str = "expert-0", **settings: Any) -> Iterator[ExpertService]:
    """Context: an actor that serves all experts."""
    with closing(ExpertService(name=name, **{"is_given": any_directory, **settings})) as service:
        service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint)))
        yield service


@contextmanager
def training(
    checkpoint: Path, name: str = "expert-0", optimizer: OptimizerSettings = SGD, term: int = 1, **settings: Any
) -> Iterator[ExpertService]:
    """Context: an actor that trains all experts."""
    with closing(ExpertService(name=name, **{"is_given": any_directory, **settings})) as service:
        service.load(
            LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), optimizer=optimizer, training_term=term)
        )
        yield service


def batch_of(rows: int = 2, *, seed: int = 0, phase: Phase = Phase.FORWARD, **given: Any) -> ComputeBatch:
    groups = {0: list(range(rows)), 2: [rows - 1]}
    return make_batch(groups, rows=rows, width=WIDTH, layer=LAYER, seed=seed, phase=phase, **given)


def submit(service: ExpertService, batch: ComputeBatch) -> "Future[ComputeResult]":
    return InProcessTransport(service).submit(batch)


def ask(service: ExpertService, batch: ComputeBatch) -> ComputeResult:
    return submit(service, batch).result(TIMEOUT_S)


@torch.no_grad()
def expected_rows(modules: Mapping[int, nn.Module], batch: ComputeBatch) -> torch.Tensor:
    y_ND = torch.zeros_like(batch.x_ND)
    begin = 0
    for expert, count in zip(batch.experts, batch.pair_counts, strict=True):
        rows, weights = batch.pair_rows_P[begin : begin + count], batch.pair_weights_P[begin : begin + count]
        y_ND.index_add_(0, rows, modules[expert](batch.x_ND[rows]) * weights[:, None])
        begin += count
    return y_ND


def check_rows(modules: Mapping[int, nn.Module], batch: ComputeBatch, result: ComputeResult) -> None:
    assert result.y_ND is not None
    torch.testing.assert_close(result.y_ND, expected_rows(modules, batch), atol=5e-6, rtol=0)


def open_stream(
    address: str, name: str = "shm", *, incarnation: str = "", shared_memory_bytes: int = SEGMENT_BYTES
) -> GrpcExpertTransport:
    return GrpcExpertTransport(
        ActorAddress(actor="expert-0", address=address, incarnation=incarnation),
        router="test",
        shared_memory_bytes=shared_memory_bytes if name == "shm" else 0,
    )


@contextmanager
def served(service: ExpertService) -> Iterator[RunningServer]:
    server = serve_expert(service, credentials=None)
    try:
        yield server
    finally:
        server.stop(0.0)


def result_of(transport: GrpcExpertTransport, batch: ComputeBatch) -> ComputeResult:
    return transport.submit(batch).result(TIMEOUT_S)


class Occupied:
    """Context: the service's compute thread is blocked in the reply to a batch."""

    def __init__(self, service: ExpertService) -> None:
        self._service = service
        self._stopped, self._go = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        def reply(outcome: ComputeResult | MoeClusterError) -> None:
            self._stopped.set()
            self._go.wait(TIMEOUT_S)

        self._service.submit(batch_of(), reply)
        assert self._stopped.wait(TIMEOUT_S)

    def __exit__(self, *error: object) -> None:
        self._go.set()


def wait_for_rows(service: ExpertService, rows: int) -> None:
    """Waits until this many rows are in the queue of an occupied actor."""
    wait_until(lambda: queued_rows(service) == rows, f"a queue of {rows} rows")


def queued_rows(service: ExpertService) -> int:
    return service.status().work.queue_rows


@contextmanager
def computing(service: ExpertService) -> Iterator[None]:
    """Context: the service computes a batch, and its state is locked meanwhile."""
    began, go, answered = threading.Event(), threading.Event(), threading.Event()
    forward = compute.forward

    def held(*arguments: Any) -> list[ComputeResult]:
        began.set()
        assert go.wait(TIMEOUT_S)
        return forward(*arguments)

    with patch.object(compute, "forward", held):
        service.submit(batch_of(), lambda outcome: answered.set())
        assert began.wait(TIMEOUT_S)
        try:
            yield
        finally:
            go.set()
            assert answered.wait(TIMEOUT_S)

"""Full queues, hung actors and broken streams, as a router experiences them."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import DeadlineExceeded, Exhausted
from moecluster.expert.service import ExpertService
from moecluster.metrics import Metrics
from moecluster.rpc.controller.in_process import FixedPlacement
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.server import RunningServer
from moecluster.types import ActorAddress, Placement, Replica
from tests.support.clusters.expert_cluster import control_of
from tests.support.expert.small_actor import (
    EXPERTS,
    LAYER,
    SEGMENT_BYTES,
    TIMEOUT_S,
    WIDTH,
    Occupied,
    batch_of,
    open_stream,
    served,
    serving,
    wait_for_rows,
)
from tests.support.waiting import wait_until


@contextmanager
def remote_experts(
    server: RunningServer, service: ExpertService, *, timeout_s: float, metrics: Metrics | None = None
) -> Iterator[RemoteExperts]:
    placement = Placement(
        term=1,
        generation=1,
        layer_experts={LAYER: len(EXPERTS)},
        actors={"expert-0": ActorAddress(actor="expert-0", address=server.address, incarnation=service.incarnation)},
        replicas=tuple(Replica(expert=expert, actor="expert-0") for expert in EXPERTS),
    )

    def connect(address: ActorAddress) -> GrpcExpertTransport:
        return GrpcExpertTransport(address, router="test", shared_memory_bytes=SEGMENT_BYTES, connect_timeout_s=2.0)

    pool = ExpertPool(FixedPlacement(placement), connect=connect, control=lambda address: control_of(service))
    remote = RemoteExperts(pool, timeout_s=timeout_s, metrics=metrics)
    try:
        yield remote
    finally:
        remote.close()


def one_token(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, WIDTH, generator=generator), torch.tensor([[0, 2]]), torch.tensor([[0.75, 0.25]])


@torch.no_grad()
def expected_token(modules: dict[int, nn.Module], seed: int) -> torch.Tensor:
    x_TD = one_token(seed)[0]
    y_TD: torch.Tensor = 0.75 * modules[0](x_TD) + 0.25 * modules[2](x_TD)
    return y_TD


def wait_for_retries(metrics: Metrics, reason: str) -> None:
    wait_until(lambda: f'reason="{reason}"' in metrics.render(), f"a retry for {reason}")


def test_backpressure_is_retried_until_there_is_room(checkpoint: Path, modules: dict[int, nn.Module]) -> None:
    metrics = Metrics(model="m")
    with (
        serving(checkpoint, max_queue_bytes=WIDTH * 4) as service,
        served(service) as server,
        remote_experts(server, service, timeout_s=TIMEOUT_S, metrics=metrics) as remote,
        ThreadPoolExecutor(8) as callers,
    ):

        @torch.no_grad()
        def call(seed: int) -> torch.Tensor:
            return remote(LAYER, *one_token(seed))

        with Occupied(service):
            calls: list[Future[torch.Tensor]] = [callers.submit(call, seed) for seed in range(8)]
            wait_for_retries(metrics, "exhausted")
        for seed, outcome in enumerate(calls):
            torch.testing.assert_close(outcome.result(TIMEOUT_S), expected_token(modules, seed), atol=5e-6, rtol=0)


def test_a_full_queue_refuses_over_the_stream_at_once(checkpoint: Path) -> None:
    with serving(checkpoint, max_queue_bytes=WIDTH * 4) as service, served(service) as server:
        transport = open_stream(server.address)
        with Occupied(service):
            futures = [transport.submit(batch_of(1, seed=seed)) for seed in range(5)]
            for future in futures[1:]:
                with pytest.raises(Exhausted, match="128 bytes wait, at most 128"):
                    future.result(TIMEOUT_S)
        assert futures[0].result(TIMEOUT_S).y_ND is not None
        transport.close()


@torch.no_grad()
def test_an_actor_that_hangs_is_given_up_at_the_deadline(service: ExpertService, server: RunningServer) -> None:
    with remote_experts(server, service, timeout_s=0.3) as remote, Occupied(service):
        started_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            remote(LAYER, *one_token(0))
        assert 0.25 < time.monotonic() - started_s < 3.0


def test_a_stream_that_breaks_is_opened_anew_and_the_batch_is_sent_again(
    service: ExpertService, server: RunningServer, modules: dict[int, nn.Module]
) -> None:
    with remote_experts(server, service, timeout_s=TIMEOUT_S) as remote, ThreadPoolExecutor(1) as caller:

        @torch.no_grad()
        def call() -> torch.Tensor:
            return remote(LAYER, *one_token(1))

        with Occupied(service):
            outcome = caller.submit(call)
            wait_for_rows(service, 1)
            remote.pool.transport(remote.pool.placement().actors["expert-0"]).close()
            wait_for_rows(service, 2)  # a retry; nothing waits for the first reply any more
        torch.testing.assert_close(outcome.result(TIMEOUT_S), expected_token(modules, 1), atol=5e-6, rtol=0)

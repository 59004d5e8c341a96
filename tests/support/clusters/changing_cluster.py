"""A cluster over real gRPC whose experts move, the traffic that must not notice, and what must be true of it then."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import pytest
import torch

from moecluster.controller.rebalance.apply import ApplierSettings
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.types import ExpertId
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.waiting import WAIT_S, wait_until

SLOTS = 4  # of each layer, whose experts are 4

StartCluster = Callable[..., LoopbackCluster]


@contextmanager
def changing_clusters(checkpoint: str) -> Iterator[StartCluster]:
    """Starts clusters that serve a tiny model, and ends them."""
    with ExitStack() as started:

        def start(
            num_actors: int = 2, *, slots: int = SLOTS, batch_invariant: bool = False, **reconciler: Any
        ) -> LoopbackCluster:
            settings: dict[str, Any] = {"policy": "share", "period_s": 0.05, "operation_timeout_s": 10.0, **reconciler}
            return started.enter_context(
                LoopbackCluster(
                    checkpoint,
                    num_actors=num_actors,
                    batch_invariant=batch_invariant,
                    observer=ObserverSettings(window="sliding", window_s=2.0, slots_per_layer=slots),
                    reconciler=ReconcilerSettings(**settings),
                    applier=ApplierSettings(drain_timeout_s=2.0),
                )
            )

        yield start


class Traffic:
    """One layer called over and over in a thread; every answer must be the first one, within rounding or exactly."""

    def __init__(self, cluster: LoopbackCluster, *, exactly: bool = False) -> None:
        self._tolerance = 0.0 if exactly else 1e-5
        generator = torch.Generator().manual_seed(0)
        self._x_TD = torch.randn(24, 32, generator=generator)
        self._ids_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(24)])
        self._weights_TK = torch.rand(24, 2, generator=generator)
        self._cluster = cluster
        self._first_TD = self._call()
        self.calls = 0
        self.failures: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _call(self) -> torch.Tensor:
        return self._cluster.remote(0, self._x_TD, self._ids_TK, self._weights_TK)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                y_TD = self._call()
                if not torch.allclose(y_TD, self._first_TD, rtol=self._tolerance, atol=self._tolerance):
                    self.failures.append("another answer")
            except Exception as exc:
                self.failures.append(repr(exc))
            self.calls += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(WAIT_S)
        assert not self.failures, self.failures[:3]
        assert self.calls > 3


def wait_for_calls(traffic: Traffic, calls: int) -> None:
    wait_until(lambda: traffic.calls >= calls)


def actors_of(cluster: LoopbackCluster, layer: int, index: int) -> list[str]:
    placement = cluster.controller.current(0.0)
    return [r.actor for r in placement.replicas_of(ExpertId(layer=layer, index=index))]


def assigned_to(cluster: LoopbackCluster, actor: str) -> set[ExpertId]:
    return set(cluster.controller.current(0.0).experts_on(actor))


def held(cluster: LoopbackCluster, actor: str) -> set[ExpertId]:
    return set(cluster.services[actor].status().experts)


def assert_whole(cluster: LoopbackCluster) -> None:
    """Every expert stands somewhere, actors hold what the placement says once all is unloaded, shares sum to 1."""
    placement = cluster.controller.current(0.0)
    for layer, count in placement.layer_experts.items():
        for index in range(count):
            replicas = placement.replicas_of(ExpertId(layer=layer, index=index))
            assert sum(r.share for r in replicas) == pytest.approx(1.0), (layer, index)
    wait_until(lambda: all(held(cluster, a) == assigned_to(cluster, a) for a in placement.actors))

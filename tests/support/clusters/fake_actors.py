"""Expert actors in this process, as a controller sees them; tests can kill, hang and restart them."""

import math
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self, cast

from moecluster.config.sections import ModelConfig
from moecluster.controller.actors.interfaces import IncarnationWatch
from moecluster.errors import DeadlineExceeded, MoeClusterError, Unavailable
from moecluster.expert.service import ExpertService
from moecluster.models.native.build import build_model
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.rpc.expert.in_process import InProcessPeerExports
from moecluster.rpc.expert.interface import ControlConnection
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import ActorAddress
from tests.support.clusters.given import any_directory

TINY = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=4, expert_inner_size=24, max_positions=256
)


def save_tiny_model(directory: Path, seed: int = 0) -> str:
    """Saves a byte-level model of the native family with 2 MoE layers of 4 experts, and its tokenizer."""
    build_model(TINY, seed).save_pretrained(directory)
    build_byte_tokenizer().save_pretrained(directory)
    return str(directory)


class FakeActors:
    """Supervisor, connections and watches over expert services of this process."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.services: dict[str, ExpertService | None] = {name: self._start(name) for name in names}
        self.hanging: set[str] = set()
        self.restarted: list[str] = []
        self.nodes: dict[str, str] = {}  # actor -> its node; other actors are on nodes of their own, node-of-NAME
        self.draining: set[str] = set()  # nodes
        self.shared: set[str] = set()  # nodes with other processes
        self.silence: MoeClusterError | None = None  # raised instead of an answer about the cluster
        self.shown: tuple[str, ...] | None = None  # the answer, instead of the actors that there are
        self.loads: list[tuple[str, str]] = []  # (actor, checkpoint) of every load
        self._watches: list[tuple[str, Callable[[], None]]] = []
        self._changed = threading.Condition()

    def address_of(self, actor: str, timeout_s: float) -> ActorAddress | None:
        with self._changed:
            self._changed.wait_for(lambda: self.services.get(actor) is not None, timeout_s)
            service = self.services.get(actor)
        if service is None:
            return None
        node = self.nodes.get(actor, f"node-of-{actor}")
        return ActorAddress(actor=actor, address="", incarnation=service.incarnation, node=node)

    def restart(self, actor: str) -> None:
        self.restarted.append(actor)
        self.hanging.discard(actor)
        self.kill(actor)
        self.revive(actor)

    def known(self) -> tuple[str, ...]:
        self._answer()
        return tuple(self.services) if self.shown is None else self.shown

    def create(self, actor: str, *, avoid_nodes: Collection[str] = ()) -> None:
        if actor not in self.services:
            self.revive(actor)

    def remove(self, actor: str) -> None:
        if self.services.get(actor) is not None:
            self.kill(actor)
        self.services.pop(actor, None)

    def draining_nodes(self) -> dict[str, float]:
        self._answer()
        return dict.fromkeys(self.draining, math.inf)

    def shared_nodes(self) -> frozenset[str]:
        self._answer()
        return frozenset(self.shared)

    def connect(self, address: ActorAddress) -> ControlConnection:
        return cast(ControlConnection, _Connection(self, address))

    def watch(self, address: ActorAddress, on_lost: Callable[[], None]) -> IncarnationWatch:
        watch = (address.incarnation, on_lost)
        self._watches.append(watch)
        return _Watch(lambda: self._watches.remove(watch))

    def living(self, address: ActorAddress) -> ExpertService:
        """Returns the service at an address. Raises what a connection to it would raise."""
        service = self.services.get(address.actor)
        if address.actor in self.hanging:
            raise DeadlineExceeded(f"{address.actor} did not answer")
        if service is None or service.incarnation != address.incarnation:
            raise Unavailable(f"{address.actor} is gone")
        return service

    def kill(self, actor: str) -> None:
        service = self.services[actor]
        assert service is not None
        self.services[actor] = None
        service.close()
        for incarnation, on_lost in list(self._watches):
            if incarnation == service.incarnation:
                on_lost()

    def revive(self, actor: str) -> None:
        with self._changed:
            self.services[actor] = self._start(actor)
            self._changed.notify_all()

    def _answer(self) -> None:
        if self.silence is not None:
            raise self.silence

    def _start(self, actor: str) -> ExpertService:
        return ExpertService(
            is_given=any_directory,
            name=actor,
            connect_peer=lambda peer: InProcessPeerExports(self.connect(peer), peer.incarnation),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for service in list(self.services.values()):
            if service is not None:
                service.close()


class _Watch:
    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close


class _Connection:
    """Forwards calls to the service while it lives."""

    def __init__(self, actors: FakeActors, address: ActorAddress) -> None:
        self._actors, self._address = actors, address

    def load(self, request: LoadRequest) -> int:
        service = self._actors.living(self._address)
        self._actors.loads.append((self._address.actor, request.checkpoint))
        return service.load(request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actors.living(self._address), name)

    def close(self) -> None:
        """Does nothing: the connection holds nothing."""

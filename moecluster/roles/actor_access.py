"""How expert actors are started, reached and watched, as the controller sees it."""

from collections.abc import Callable, Collection
from typing import Protocol

from moecluster.rpc.interfaces import ExpertControl
from moecluster.types import ActorAddress


class ActorSupervisor(Protocol):
    """What starts expert actors, and starts them again when they die."""

    def address_of(self, actor: str, timeout_s: float) -> ActorAddress | None:
        """Where the actor listens now; waits while it is started again. None after the timeout."""

    def restart(self, actor: str) -> None:
        """Ends a process that hangs, so that a new one takes its place. Never raises."""

    def known(self) -> tuple[str, ...]:
        """The expert actors that are there, or are being started."""

    def create(self, actor: str, *, avoid_nodes: Collection[str] = ()) -> None:
        """Asks for a new actor; it comes when there is room for it. Fine if it is there already."""

    def remove(self, actor: str) -> None:
        """Ends an actor for good. Fine if it is gone already."""

    def draining_nodes(self) -> frozenset[str]:
        """Nodes that will be taken away soon."""


class ControlConnection(ExpertControl, Protocol):
    """Orders to one life of an expert actor, over a connection. Every order ends within a finite time."""

    def close(self) -> None:
        """Ends the connection."""


class LifeWatch(Protocol):
    """Looks out for the end of one life of an actor."""

    def close(self) -> None:
        """Ends the watch."""


Connect = Callable[[ActorAddress], ControlConnection]
Watch = Callable[[ActorAddress, Callable[[], None]], LifeWatch]

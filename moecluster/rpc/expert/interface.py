"""Interfaces of the expert actor, each implemented over gRPC and in process."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from moecluster.errors import MoeClusterError
from moecluster.optim.participant import Participant
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import ActorAddress, ComputeBatch, ComputeResult, ExpertActorStatus, ExpertId

MAX_SNAPSHOT_BYTES = 64 * 2**20

Reply = Callable[[ComputeResult | MoeClusterError], None]


class ComputeHandler(Protocol):
    """Computes batches: the expert service behind a servicer or an in-process transport."""

    incarnation: str

    def submit(self, batch: ComputeBatch, reply: Reply, *, wake: bool = True) -> None:
        """Queues a batch. reply is called exactly once, from any thread; batch tensors must stay valid until then.

        wake=False: the caller promises to call compute_waiting() right after.
        """

    def compute_waiting(self) -> None:
        """Computes queued batches in the calling thread if there are few rows and no thread computes; else wakes
        one."""


class ExpertTransport(Protocol):
    """A connection to one expert actor for batches."""

    name: str  # inline | shm | in-process: the `transport` and `lane` labels of the metrics
    reason: str  # why the lane is not a better one, in a word; best: there is none
    incarnation: str  # of the actor, learned when the transport was opened
    shortage: str  # why rows travel inline for now, for want of memory to share; empty: they need not, or never will

    def submit(self, batch: ComputeBatch) -> "Future[ComputeResult]":
        """Sends a batch. The future holds the result or a MoeClusterError; it ends by the batch's deadline."""

    def close(self) -> None:
        """Ends the stream; batches in flight fail with Unavailable."""


@dataclass(frozen=True, kw_only=True)
class ExportedTensor:
    """One tensor of an expert's state, as an actor exports it."""

    expert: ExpertId
    name: str  # a parameter's name, or optimizer/NAME/PARAMETER
    value: torch.Tensor
    weight_version: int = 0  # of the expert


class ExpertControl(Participant, Protocol):
    """All requests that an expert actor serves besides batches."""

    def load(self, request: LoadRequest) -> int:
        """Loads experts, and their optimizer state if the checkpoint has it. Returns the bytes loaded.

        Experts of other weight versions stay loaded. Raises Unavailable if a peer cannot deliver an expert; experts
        loaded before it stay.
        """

    def unload(self, *, term: int, experts: Sequence[ExpertId], drain_timeout_s: float = 0.0) -> None:
        """Drops experts in all weight versions, once no queued batch needs them or the drain timeout is over. Ignores
        unknown experts."""

    def set_placement(self, notice: PlacementNotice) -> None:
        """Sets the current placement; status returns it, the checkpoint, and on request the snapshot."""

    def status(self, training_term: int = 0, *, with_snapshot: bool = False) -> ExpertActorStatus:
        """Fences with the term unless it is 0, then reports."""

    def export(
        self,
        *,
        experts: Sequence[ExpertId],
        with_optimizer: bool,
        step: int = 0,
        incarnation: str = "",
        weight_version: int = 0,
    ) -> Iterator[ExportedTensor]:
        """Streams the experts' tensors. incarnation: if given, any other incarnation of the actor refuses.
        weight_version: 0 for the served one."""


Pace = Callable[[int], None]  # gets the size of each received chunk; may wait, or raise to stop


class PeerExports(Protocol):
    """The tensors of one incarnation of another actor, for copying experts from it."""

    def tensors(
        self, expert: ExpertId, *, weight_version: int = 0, max_tensor_bytes: int, timeout_s: float, pace: Pace
    ) -> Iterator[ExportedTensor]:
        """Yields the expert's parameters in a version; 0: the one that the peer serves.

        Raises what the peer raises, and InvalidMessage for content that does not match its description.
        """

    def close(self) -> None:
        """Ends the connection."""


ConnectPeer = Callable[[ActorAddress], PeerExports]


class ControlConnection(ExpertControl, Protocol):
    """A connection for requests to one incarnation of an expert actor. Every request ends within a finite time."""

    def close(self) -> None:
        """Ends the connection."""


Connect = Callable[[ActorAddress], ControlConnection]


class ExpertHandler(ComputeHandler, ExpertControl, Protocol):
    """The implementation behind ExpertService."""

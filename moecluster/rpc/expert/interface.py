"""Interfaces of the expert actor, each with an implementation over gRPC and an in-process twin."""

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
    """What computes batches: the expert service behind a servicer or an in-process transport."""

    incarnation: str

    def submit(self, batch: ComputeBatch, reply: Reply, *, wake: bool = True) -> None:
        """Queues a batch. reply is called exactly once, from any thread; batch tensors must stay valid until then.

        wake=False: the caller promises to call compute_waiting() right after.
        """

    def compute_waiting(self) -> None:
        """Computes what waits in the calling thread, if that is little and nobody computes; else wakes another."""


class ExpertTransport(Protocol):
    """A way to one expert actor."""

    name: str  # inline | shm | in-process: the `transport` label of the metrics
    incarnation: str  # of the peer, learned when the transport was opened

    def submit(self, batch: ComputeBatch) -> "Future[ComputeResult]":
        """Sends a batch. The future holds the result or a MoeClusterError; it ends by the batch's deadline."""

    def close(self) -> None:
        """Ends the stream; what is in flight fails with Unavailable."""


@dataclass(frozen=True, kw_only=True)
class ExportedTensor:
    """One tensor of an expert's state, as it leaves the actor."""

    expert: ExpertId
    name: str  # a parameter's name, or optimizer/NAME/PARAMETER
    value: torch.Tensor
    weight_version: int = 0  # of the expert


class ExpertControl(Participant, Protocol):
    """All orders that an expert actor takes."""

    def load(self, request: LoadRequest) -> int:
        """Loads experts, and their optimizer state where the checkpoint has it. Returns the bytes loaded.

        They are loaded beside those of other weight versions. What a peer cannot give raises Unavailable, and what
        came before stays.
        """

    def unload(self, *, term: int, experts: Sequence[ExpertId], drain_timeout_s: float = 0.0) -> None:
        """Drops experts in all versions, once nothing that waits wants them or the time is over; unknown ones are
        fine."""

    def set_placement(self, notice: PlacementNotice) -> None:
        """Tells the actor the current placement; status returns it, the checkpoint, and the snapshot if asked for
        it."""

    def status(self, training_term: int = 0, *, with_snapshot: bool = False) -> ExpertActorStatus:
        """Fences with the term if it is not 0, then reports."""

    def export(
        self,
        *,
        experts: Sequence[ExpertId],
        with_optimizer: bool,
        step: int = 0,
        incarnation: str = "",
        weight_version: int = 0,
    ) -> Iterator[ExportedTensor]:
        """Streams the experts' tensors; with an incarnation, only that incarnation of the actor does. weight_version: 0
        for the one that is served."""


Pace = Callable[[int], None]  # told of bytes that came, before more are taken; it may wait, and raise to end


class PeerExports(Protocol):
    """What one incarnation of another actor holds, as experts are copied from there."""

    def tensors(
        self, expert: ExpertId, *, weight_version: int = 0, max_tensor_bytes: int, timeout_s: float, pace: Pace
    ) -> Iterator[ExportedTensor]:
        """The expert's parameters in a version; 0: in the one that the peer serves.

        Raises what the peer raises, InvalidMessage for content that is not as announced.
        """

    def close(self) -> None:
        """Ends the connection."""


ConnectPeer = Callable[[ActorAddress], PeerExports]


class ControlConnection(ExpertControl, Protocol):
    """Orders to one incarnation of an expert actor, over a connection. Every order ends within a finite time."""

    def close(self) -> None:
        """Ends the connection."""


Connect = Callable[[ActorAddress], ControlConnection]


class ExpertHandler(ComputeHandler, ExpertControl, Protocol):
    """What stands behind the service."""

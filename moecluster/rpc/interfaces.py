"""The interfaces between roles, each with an implementation over gRPC and an in-process twin."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from moecluster.errors import MoeClusterError
from moecluster.types import (
    ActorAddress,
    ComputeBatch,
    ComputeResult,
    ExpertActorStatus,
    ExpertId,
    MessageKey,
    OptimizerSettings,
    Placement,
    ReduceResult,
    StepTag,
)

MAX_PICTURE_BYTES = 64 * 2**20

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


class Participant(Protocol):
    """What takes part in a training step: an expert actor, or a rank's trunk. Older terms' orders raise StaleOrder."""

    name: str

    def reduce(self, tag: StepTag, expected: Sequence[MessageKey]) -> ReduceResult:
        """Sums the attempt's gradients. Raises AttemptAborted if they do not come from exactly these messages."""

    def prepare(self, tag: StepTag, *, clip_scale: float, learning_rate: float) -> str:
        """Computes the new state beside the old one; returns the incarnation."""

    def commit(self, tag: StepTag) -> str:
        """Swaps the prepared state in; repeated is fine. Returns the incarnation."""

    def abort(self, tag: StepTag) -> None:
        """Forgets the attempt: gradients, kept activations, prepared state. Unknown attempts are fine."""

    def status(self, training_term: int = 0) -> ExpertActorStatus:
        """Fences with the term if it is not 0, then reports."""


@dataclass(frozen=True, kw_only=True)
class ExportedTensor:
    """One tensor of an expert's state, as it leaves the actor."""

    expert: ExpertId
    name: str  # a parameter's name, or optimizer/NAME/PARAMETER
    value: torch.Tensor
    weight_version: int = 0  # of the expert


class ExpertControl(Participant, Protocol):
    """All orders that an expert actor takes."""

    def load(
        self,
        *,
        term: int,
        experts: Sequence[ExpertId],
        checkpoint: str,
        dtype: str = "",
        weight_version: int = 0,
        optimizer: OptimizerSettings | None = None,
        replace: bool = False,
        training_term: int = 0,
        timeout_s: float = 60.0,
        peer: ActorAddress | None = None,
        max_bytes_per_s: int = 0,
    ) -> int:
        """Loads experts, and their optimizer state where the checkpoint has it. Returns the bytes loaded.

        They are loaded beside those of other weight versions; 0 stands for the version that is served.

        With a peer the weights are copied from there, at most max_bytes_per_s of them (0: as fast as it goes); what the
        peer cannot give raises Unavailable, and what came before stays.
        """

    def unload(self, *, term: int, experts: Sequence[ExpertId], drain_timeout_s: float = 0.0) -> None:
        """Drops experts in all versions, once nothing that waits wants them or the time is over; unknown ones are
        fine."""

    def set_placement(
        self,
        *,
        term: int,
        generation: int,
        checkpoint: str = "",
        picture: bytes = b"",
        weight_version: int = 0,
        weight_versions: Sequence[int] = (),
    ) -> None:
        """Tells the actor the placement that now stands, and what lost experts are loaded from; status returns both.

        picture: what the controller wants its successor to read, at most MAX_PICTURE_BYTES; b"" leaves the last one.
        weight_version: what a batch without one means. weight_versions: those that stand; experts of others are
        dropped.
        """

    def status(self, training_term: int = 0, *, with_picture: bool = False) -> ExpertActorStatus:
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
        """Streams the experts' tensors; with an incarnation, only that life of the actor does. weight_version: 0 for
        the one that is served."""


Pace = Callable[[int], None]  # told of bytes that came, before more are taken; it may wait, and raise to end


class PeerExports(Protocol):
    """What one life of another actor holds, as experts are copied from there."""

    def tensors(
        self, expert: ExpertId, *, weight_version: int = 0, max_tensor_bytes: int, timeout_s: float, pace: Pace
    ) -> Iterator[ExportedTensor]:
        """The expert's parameters in a version; 0: in the one that the peer serves.

        Raises what the peer raises, InvalidMessage for content that is not as announced.
        """

    def close(self) -> None:
        """Ends the connection."""


ConnectPeer = Callable[[ActorAddress], PeerExports]


class PlacementSource(Protocol):
    """Where a router learns the placement: the controller's stream, or a fixed one."""

    def current(self, timeout_s: float) -> Placement:
        """The newest placement; waits for a first one. Raises Unavailable after the timeout."""

    def newer_than(self, number: tuple[int, int], timeout_s: float) -> Placement | None:
        """Waits for a placement with a higher (term, generation); None after the timeout."""

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        """Says that an actor did not answer. Never blocks, never raises."""

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: tuple[int, int]) -> None:
        """Says that an actor's replica of an expert answers NaN or infinity. Never blocks, never raises.

        placement: (term, generation) by which it was asked.
        """


class ControllerLink(PlacementSource, Protocol):
    """A router's way to the controller: the placements, and what the router has to tell."""

    def want_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Says that tokens wait for experts of a layer that stand nowhere. Never blocks, never raises."""


class PlacementHold(Protocol):
    """What keeps the placement as it is while experts are trained."""

    def hold(self, timeout_s: float) -> None:
        """Returns when the standing placement stays as it is. Raises DeadlineExceeded otherwise, and lets go."""

    def release(self) -> None:
        """The placement may change again. Fine if nothing was held."""

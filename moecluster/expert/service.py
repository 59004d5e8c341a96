"""The expert actor's service: holds experts, computes queued batches, and serves controller and step coordinator."""

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from moecluster.errors import InvalidMessage, StaleRequest
from moecluster.expert.fencing import ControllerFence
from moecluster.expert.loader import ExpertLoader
from moecluster.expert.queue import ComputeQueue
from moecluster.expert.store import ExpertStore
from moecluster.expert.training import ExpertTraining
from moecluster.expert.worker import ExpertComputing
from moecluster.growing import MAX_NUMBER
from moecluster.memory import ResidentMemory, return_freed_memory
from moecluster.metrics import Metrics
from moecluster.models.checkpoint.reader import OpenCheckpoint
from moecluster.models.given_directories import IsGiven, check_given
from moecluster.moe.linear import plain
from moecluster.rpc.expert.export import GrpcPeerExports
from moecluster.rpc.expert.interface import MAX_SNAPSHOT_BYTES, ConnectPeer, ExportedTensor, Reply
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import (
    NO_PLACEMENT,
    ComputeBatch,
    ExpertActorStatus,
    ExpertId,
    MessageKey,
    PlacementNumber,
    ReduceResult,
    StepTag,
)

DRAIN_POLL_S = 0.005


class ExpertService:
    """Implements ComputeHandler and ExpertControl of rpc/expert/interface.py."""

    def __init__(
        self,
        *,
        name: str,
        is_given: IsGiven,
        max_queue_bytes: int = 256 * 2**20,
        activation_budget_bytes: int = 256 * 2**20,
        batch_invariant: bool = False,
        metrics: Metrics | None = None,
        connect_peer: ConnectPeer = GrpcPeerExports,
        open_elsewhere: OpenCheckpoint | None = None,
    ) -> None:
        """Starts the compute thread; close() ends it. is_given: whether experts may be loaded from a directory.

        connect_peer: opens a connection to an actor from which experts are copied.
        open_elsewhere: opens checkpoints that are not on this node.
        """
        self.name = name
        self._is_given = is_given
        self.incarnation = secrets.token_hex(8)
        self._hosted = ExpertStore()
        self._memory = ResidentMemory()
        self._queue = ComputeQueue(max_queue_bytes)
        self._training = ExpertTraining(name, activation_budget_bytes)
        # Held while a batch is computed and while parameters or training state change. Taken before self._fence.
        self._state_lock = threading.RLock()
        self._fence = ControllerFence()
        self._loader = ExpertLoader(
            name,
            self._hosted,
            self._training,
            self._state_lock,
            connect_peer=connect_peer,
            open_elsewhere=open_elsewhere,
            batch_invariant=batch_invariant,
        )
        self._placement = NO_PLACEMENT
        self._checkpoint = ""  # from the last set_placement
        self._snapshot = b""  # likewise
        self._computing = ExpertComputing(
            name,
            self.incarnation,
            self._queue,
            self._hosted,
            self._training,
            self._state_lock,
            run=lambda: self._loader.run,
            placement=lambda: self._placement,
            metrics=metrics,
        )
        if metrics is not None:
            metrics.watch_replicas(name, self._hosted.by_layer)
            metrics.watch_queue(name, lambda: self._queue.rows)

    @property
    def store(self) -> ExpertStore:
        """The loaded experts."""
        return self._hosted

    @property
    def fence(self) -> ControllerFence:
        """Admits the controller's requests; knows those under way."""
        return self._fence

    @property
    def is_computing(self) -> bool:
        """Whether a thread computes a batch or replies to it."""
        return self._computing.is_computing

    def trains(self, expert: ExpertId) -> bool:
        """Whether the expert is being trained here."""
        return self._training.holds(expert)

    # -- computing --

    def submit(self, batch: ComputeBatch, reply: Reply, *, wake: bool = True) -> None:
        """Queues a batch; a full queue replies Exhausted at once. wake=False: the caller calls compute_waiting()
        next."""
        self._computing.submit(batch, reply, wake=wake)

    def compute_waiting(self) -> None:
        """Computes queued batches in the calling thread if there are few rows and no thread computes; else wakes
        one."""
        self._computing.compute_waiting()

    def close(self) -> None:
        """Computes the queued batches, then stops."""
        self._computing.close()
        self._loader.packer.close()

    def wait_packed(self, timeout_s: float) -> bool:
        """Waits until every served expert is packed (the fastest layout); returns whether that is so in time."""
        return self._loader.packer.wait(timeout_s)

    # -- requests of the controller --

    def load(self, request: LoadRequest) -> int:
        """Loads experts from a checkpoint directory or a peer; experts already loaded stay unless `replace` is set.

        Experts of other weight versions stay loaded. With an optimizer, the experts are trained from the checkpoint's
        step on. Returns the bytes loaded. Loads wait for each other; other requests and batches do not wait for loads.
        Experts loaded before an error stay. Raises NotGiven for a directory that the cluster was not given, before
        anything is read or changed; CheckpointError, InvalidMessage, DeadlineExceeded; StaleRequest for an older term,
        for experts unloaded meanwhile, or if the peer has another weight version; Unavailable if the peer fails to
        deliver the experts.
        """
        check_given(request.checkpoint, self._is_given)
        if request.peer is not None and request.optimizer is not None:
            raise InvalidMessage("peer_address", "experts are trained from a checkpoint on, not from a peer")
        self._hosted.check_version(request.weight_version)
        self._training.check_term(request.training_term)
        with self._fence.loading(request.term, request.experts, request.timeout_s) as admitted:
            return self._loader.load(admitted, request)

    def unload(self, *, term: int, experts: Sequence[ExpertId], drain_timeout_s: float = 0.0) -> None:
        """Drops experts in all weight versions; unknown experts are ignored. A load requested meanwhile keeps its
        experts.

        First waits up to drain_timeout_s until no queued or running batch needs them. Raises StaleRequest.
        """
        with self._fence.unloading(term, experts) as admitted:
            deadline_s = time.monotonic() + drain_timeout_s
            while time.monotonic() < deadline_s and self._queue.wants(admitted.experts):
                self._fence.check(term)
                time.sleep(DRAIN_POLL_S)
            with self._state_lock, self._fence.admitted(term):
                for expert in admitted.experts:
                    self._hosted.remove(expert)
                    self._training.remove(expert)
        return_freed_memory()

    def set_placement(self, notice: PlacementNotice) -> None:
        """Sets the current placement, the checkpoint for reloading lost experts, and the controller's snapshot.

        status returns them; an empty snapshot keeps the last one. Drops experts of weight versions no longer in use.
        Raises StaleRequest, InvalidMessage.
        """
        version, versions = notice.weight_version, notice.weight_versions
        if len(notice.snapshot) > MAX_SNAPSHOT_BYTES:
            raise InvalidMessage("snapshot", f"{len(notice.snapshot)} bytes, at most {MAX_SNAPSHOT_BYTES}")
        if 0 in versions:
            raise InvalidMessage("weight_versions", "they begin at 1")
        if versions and version not in versions:
            raise InvalidMessage("weight_version", f"{version} is none of {list(versions[:5])}")
        if notice.generation > MAX_NUMBER:
            raise InvalidMessage("generation", f"{notice.generation}, at most {MAX_NUMBER}")
        for named in (version, *versions):
            self._hosted.check_version(named)
        placement = PlacementNumber(notice.term, notice.generation)
        with self._fence.admitted(notice.term):
            if placement < self._placement:
                return
            self._placement, self._checkpoint = placement, notice.checkpoint
            self._snapshot = notice.snapshot or self._snapshot
            surplus = self._hosted.surplus_versions(version, versions)
            if not surplus and version:
                self._hosted.keep_versions(version, versions)
        if surplus:
            self._drop_other_versions(placement, version, versions)

    def _drop_other_versions(self, placement: PlacementNumber, version: int, versions: Sequence[int]) -> None:
        with self._state_lock, self._fence.admitted(placement.term):
            if self._placement != placement:
                return  # a newer placement was set meanwhile
            for expert in self._hosted.keep_versions(version, versions):
                self._training.remove(expert)
        return_freed_memory()

    def export(
        self,
        *,
        experts: Sequence[ExpertId],
        with_optimizer: bool,
        step: int = 0,
        incarnation: str = "",
        weight_version: int = 0,
    ) -> Iterator[ExportedTensor]:
        """Yields copies of the experts' tensors. Computing goes on; experts in training pause while they are copied.

        Raises NotHosted, StaleRequest for another step or incarnation.
        """
        if incarnation and incarnation != self.incarnation:
            raise StaleRequest(f"this is incarnation {self.incarnation}, not {incarnation}")
        for expert in experts:
            if not (self._training.has_begun or step or with_optimizer):
                hosted = self._hosted.get(expert, weight_version)
                tensors: Iterator[tuple[str, torch.Tensor]] = (
                    (name, plain(p)) for name, p in hosted.module.named_parameters()
                )
            else:
                with self._state_lock:
                    hosted = self._hosted.get(expert, weight_version)
                    tensors = iter(self._training_tensors(expert, hosted.module, with_optimizer, step))
            for name, value in tensors:
                yield ExportedTensor(expert=expert, name=name, value=value, weight_version=hosted.weight_version)

    def _training_tensors(
        self, expert: ExpertId, module: nn.Module, with_optimizer: bool, step: int
    ) -> list[tuple[str, torch.Tensor]]:
        if step and not (self._training.has_begun and self._training.state.step == step):
            raise StaleRequest(f"step {step} is not what is committed here")
        tensors = [(name, plain(p)) for name, p in module.named_parameters()]
        if with_optimizer:
            tensors += [(f"optimizer/{name}", v) for name, v in self._training.state_tensors(expert).items()]
        return tensors

    # -- requests of the step coordinator --

    def reduce(self, tag: StepTag, expected: Sequence[MessageKey]) -> ReduceResult:
        with self._state_lock:
            square_norm = self._training.state.reduce(tag, expected)
        return ReduceResult(incarnation=self.incarnation, square_norm=square_norm)

    def prepare(self, tag: StepTag, *, clip_scale: float, learning_rate: float) -> str:
        with self._state_lock:
            self._training.state.prepare(tag, clip_scale=clip_scale, learning_rate=learning_rate)
        return self.incarnation

    def commit(self, tag: StepTag) -> str:
        with self._state_lock:
            self._training.commit(tag)
        return self.incarnation

    def abort(self, tag: StepTag) -> None:
        with self._state_lock:
            self._training.abort(tag)

    def status(self, training_term: int = 0, *, with_snapshot: bool = False) -> ExpertActorStatus:
        with self._state_lock:
            training = self._training.state if self._training.has_begun else None
            # Read before the experts: if the version changes meanwhile, the experts still match the version reported.
            weight_version = self._hosted.weight_version
            if training_term and training is not None:
                training.fence(training_term)
            return ExpertActorStatus(
                actor=self.name,
                incarnation=self.incarnation,
                placement=self._placement,
                experts=self._hosted.ids(weight_version),
                hosted_bytes=self._hosted.size_bytes(),
                weight_version=weight_version,
                training_term=training.term if training is not None else 0,
                committed=training.committed if training is not None else None,
                prepared=training.prepared if training is not None else None,
                rss_bytes=self._memory.size_bytes(),
                checkpoint=self._checkpoint,
                snapshot=self._snapshot if with_snapshot else b"",
                work=replace(self._computing.work, queue_rows=self._queue.rows),
                other_versions=self._hosted.other_versions(weight_version),
            )

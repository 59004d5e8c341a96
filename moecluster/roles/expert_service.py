"""The expert actor's role: holds experts, computes what waits, and takes the orders of controller and coordinator."""

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import psutil
import torch
from torch import nn

from moecluster.errors import (
    DeadlineExceeded,
    InvalidMessage,
    MoeClusterError,
    StaleOrder,
)
from moecluster.experts import compute
from moecluster.linear import plain
from moecluster.metrics import Metrics
from moecluster.models.checkpoint import OpenCheckpoint
from moecluster.roles.arriving_experts import LoadSettings
from moecluster.roles.compute_queue import ComputeQueue, Waiting
from moecluster.roles.controller_orders import ControllerOrders
from moecluster.roles.expert_loader import ExpertLoader
from moecluster.roles.expert_training import ExpertTraining
from moecluster.roles.freed_memory import return_freed_memory
from moecluster.roles.hosted_experts import HostedExperts
from moecluster.rpc.interfaces import MAX_PICTURE_BYTES, ConnectPeer, ExportedTensor, Reply
from moecluster.rpc.peer_exports import GrpcPeerExports
from moecluster.types import (
    ActorAddress,
    ActorWork,
    ComputeBatch,
    ComputeResult,
    ExpertActorStatus,
    ExpertId,
    MessageKey,
    OptimizerSettings,
    Phase,
    ReduceResult,
    StepTag,
)

JOIN_TIMEOUT_S = 10.0
DRAIN_LOOK_S = 0.005
MAX_ROWS_AT_ONCE = 256  # that a stream's own thread computes: beyond, another thread is woken and it reads on


class ExpertService:
    """Satisfies ComputeHandler and ExpertControl of rpc/interfaces.py.

    One thread at a time computes: the service's own, or that of a stream.
    """

    def __init__(
        self,
        *,
        name: str,
        max_queue_bytes: int = 256 * 2**20,
        activation_budget_bytes: int = 256 * 2**20,
        batch_invariant: bool = False,
        metrics: Metrics | None = None,
        connect_peer: ConnectPeer = GrpcPeerExports,
        open_elsewhere: OpenCheckpoint | None = None,
    ) -> None:
        """Begins to compute; ends with close(). connect_peer: the way to an actor that experts are copied from.

        open_elsewhere: opens checkpoints that this node does not see.
        """
        self.name = name
        self.incarnation = secrets.token_hex(8)
        self._metrics = metrics
        self._work = ActorWork()  # replaced whole by who computes
        self._hosted = HostedExperts()
        self._queue = ComputeQueue(max_queue_bytes)
        self._training = ExpertTraining(name, activation_budget_bytes)
        self._computing = threading.Lock()  # held from taking out of the queue to the reply
        # Held while a batch is computed and while parameters or training state change. Taken before self._orders.
        self._state_lock = threading.RLock()
        self._orders = ControllerOrders()
        self._loader = ExpertLoader(
            name,
            self._hosted,
            self._training,
            self._state_lock,
            connect_peer=connect_peer,
            open_elsewhere=open_elsewhere,
            batch_invariant=batch_invariant,
        )
        self._placement = (0, 0)
        self._checkpoint = ""  # as the last set_placement said
        self._picture = b""  # likewise
        self._thread = threading.Thread(target=self._compute_forever, name=f"compute-{name}", daemon=True)
        self._thread.start()

    # -- computing --

    def submit(self, batch: ComputeBatch, reply: Reply, *, wake: bool = True) -> None:
        """Queues a batch; a full queue answers Exhausted at once. wake=False: compute_waiting() is called next."""
        try:
            self._queue.put(Waiting(batch=batch, reply=reply, arrived_s=time.monotonic()), wake=wake)
        except MoeClusterError as exc:
            reply(exc)

    def compute_waiting(self) -> None:
        """Computes in the calling thread what waits, if that is little and nobody computes; else wakes the own thread.

        Saves small batches the way to another thread, which on an idle core takes as long as they do.
        """
        if self._queue.rows <= MAX_ROWS_AT_ONCE and self._computing.acquire(blocking=False):
            try:
                self._compute_next()
            finally:
                self._computing.release()
        self._queue.wake()  # what came meanwhile from others, who found somebody computing

    def close(self) -> None:
        """Computes what waits, then ends."""
        self._queue.close()
        self._thread.join(JOIN_TIMEOUT_S)
        self._loader.packer.close()

    def wait_packed(self, timeout_s: float) -> bool:
        """Whether every expert that is served has the layout that is computed fastest with, within the timeout."""
        return self._loader.packer.wait(timeout_s)

    def _compute_forever(self) -> None:
        while self._queue.wait():
            with self._computing:
                self._compute_next()

    def _compute_next(self) -> None:
        try:
            if taken := self._queue.take():
                self._answer(taken)
        finally:
            self._queue.done()

    def _answer(self, taken: Sequence[Waiting]) -> None:
        started_s = time.perf_counter()
        waited_s = sum(time.monotonic() - w.arrived_s for w in taken)
        fresh = [w for w in taken if not w.expired]
        for waiting in taken:
            if waiting not in fresh:
                waiting.reply(DeadlineExceeded("the batch waited longer than its deadline"))
        if not fresh:
            self._count(taken, waited_s=waited_s)
            return
        try:
            outcomes: Sequence[ComputeResult | MoeClusterError] = self._compute(fresh)
        except MoeClusterError as exc:
            outcomes = [exc] * len(fresh)
        except Exception as exc:  # whatever torch or a user's own expert raises ends these batches, not the actor
            outcomes = [MoeClusterError(f"the computation failed: {exc}")] * len(fresh)
        for waiting, outcome in zip(fresh, outcomes, strict=True):
            waiting.reply(outcome)
        pairs, busy_s = sum(len(w.batch.pair_rows_P) for w in fresh), time.perf_counter() - started_s
        runs = len(set().union(*(w.batch.experts for w in fresh)))  # what waited for one expert was merged
        self._count(taken, waited_s=waited_s, pairs=pairs, runs=runs, busy_s=busy_s)
        if self._metrics is not None:
            self._metrics.count_computed(self.name, pairs=pairs, runs=runs, busy_s=busy_s)
            self._metrics.set_queue_rows(self.name, self._queue.rows)

    def _count(
        self, taken: Sequence[Waiting], *, waited_s: float, pairs: int = 0, runs: int = 0, busy_s: float = 0.0
    ) -> None:
        work = self._work
        self._work = ActorWork(
            computed_rows=work.computed_rows + pairs,
            expert_runs=work.expert_runs + runs,
            busy_s=work.busy_s + busy_s,
            batches=work.batches + len(taken),
            queue_wait_s=work.queue_wait_s + waited_s,
        )

    def _compute(self, taken: Sequence[Waiting]) -> Sequence[ComputeResult | MoeClusterError]:
        batches = [w.batch for w in taken]
        with self._state_lock:
            if batches[0].phase is not Phase.FORWARD:
                return [self._compute_training(batches[0])]
            outcomes: dict[int, ComputeResult | MoeClusterError] = {}
            ready, experts = [], {}
            for i, batch in enumerate(batches):
                try:
                    experts = self._experts_of(batch)  # all of the layer's
                    ready.append(i)
                except MoeClusterError as exc:
                    outcomes[i] = exc
            if ready:
                results = compute.forward(experts, [batches[i] for i in ready], self._loader.run)
                outcomes.update(zip(ready, results, strict=True))
            return [outcomes[i] for i in range(len(batches))]

    def _experts_of(self, batch: ComputeBatch) -> dict[int, nn.Module]:
        experts = self._hosted.layer(batch.layer, batch.experts, self._placement, batch.weight_version)
        parameter = next(experts[batch.experts[0]].parameters(), None)
        if parameter is not None and parameter.dtype != batch.x_ND.dtype:
            raise InvalidMessage(f"x.dtype: {batch.x_ND.dtype}, and the experts are {parameter.dtype}")
        width = self._hosted.widths[batch.layer]
        if batch.x_ND.shape[1] != width:
            raise InvalidMessage(f"x.shape: rows of {batch.x_ND.shape[1]}, and the experts take {width}")
        return experts

    def _compute_training(self, batch: ComputeBatch) -> ComputeResult:
        self._training.check_begun()
        experts = self._experts_of(batch)
        if batch.incarnation and batch.incarnation != self.incarnation:
            raise StaleOrder(f"this is incarnation {self.incarnation}, not {batch.incarnation}")
        return self._training.compute(experts, batch, self._loader.run)

    # -- orders of the controller --

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
        """Loads experts out of a checkpoint directory, or out of a peer; what is hosted already stays unless replaced.

        They come beside what is here of other weight versions; 0 stands for the version that is served. With an
        optimizer they are trained from the checkpoint's step on. Returns the bytes loaded. Loads wait for each other,
        and no other order or batch for them; what came before an error stays. Raises CheckpointError, InvalidMessage,
        DeadlineExceeded; StaleOrder for an older term, experts that were unloaded since, or a peer with
        another weight version; Unavailable if the peer does not give what it should.
        """
        if peer is not None and optimizer is not None:
            raise InvalidMessage("peer_address: experts are trained from a checkpoint on, not from a peer")
        settings = LoadSettings(
            experts=experts,
            checkpoint=checkpoint,
            dtype=dtype,
            weight_version=weight_version,
            replace=replace,
            optimizer=optimizer,
            training_term=training_term,
            peer=peer,
            max_bytes_per_s=max_bytes_per_s,
        )
        with self._orders.loading(term, experts, timeout_s) as order:
            return self._loader.load(order, settings)

    def unload(self, *, term: int, experts: Sequence[ExpertId], drain_timeout_s: float = 0.0) -> None:
        """Drops experts in all versions; unknown ones are fine. A load that is ordered meanwhile keeps its own.

        Waits first until no batch in the queue wants them, drain_timeout_s at most. Raises StaleOrder.
        """
        with self._orders.unloading(term, experts) as order:
            deadline_s = time.monotonic() + drain_timeout_s
            while time.monotonic() < deadline_s and self._queue.wants(order.experts):
                self._orders.check(term)
                time.sleep(DRAIN_LOOK_S)
            with self._state_lock, self._orders.admitted(term):
                for expert in order.experts:
                    self._hosted.remove(expert)
                    self._training.remove(expert)
        return_freed_memory()

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
        """The placement that now stands, what lost experts are loaded from, and the controller's picture.

        status returns them; an empty picture leaves the last one. Experts of versions that do not stand any more are
        dropped. Raises StaleOrder, InvalidMessage.
        """
        if len(picture) > MAX_PICTURE_BYTES:
            raise InvalidMessage(f"picture: {len(picture)} bytes, at most {MAX_PICTURE_BYTES}")
        if 0 in weight_versions:
            raise InvalidMessage("weight_versions: they begin at 1")
        if weight_versions and weight_version not in weight_versions:
            raise InvalidMessage(f"weight_version: {weight_version} is none of {list(weight_versions)[:5]}")
        with self._orders.admitted(term):
            if (term, generation) < self._placement:
                return
            self._placement, self._checkpoint = (term, generation), checkpoint
            self._picture = picture or self._picture
            surplus = self._hosted.surplus_versions(weight_version, weight_versions)
            if not surplus and weight_version:
                self._hosted.keep_versions(weight_version, weight_versions)
        if surplus:
            self._keep_versions(term, (term, generation), weight_version, weight_versions)

    def _keep_versions(
        self, term: int, placement: tuple[int, int], weight_version: int, weight_versions: Sequence[int]
    ) -> None:
        with self._state_lock, self._orders.admitted(term):
            if self._placement != placement:
                return  # something newer was said meanwhile
            for expert in self._hosted.keep_versions(weight_version, weight_versions):
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
        """Copies of the experts' tensors. Computing goes on meanwhile; experts in training stand still for their copy.

        Raises NotHosted, StaleOrder for another step or incarnation.
        """
        if incarnation and incarnation != self.incarnation:
            raise StaleOrder(f"this is incarnation {self.incarnation}, not {incarnation}")
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
            raise StaleOrder(f"step {step} is not what is committed here")
        tensors = [(name, plain(p)) for name, p in module.named_parameters()]
        if with_optimizer:
            tensors += [(f"optimizer/{name}", v) for name, v in self._training.state_tensors(expert).items()]
        return tensors

    # -- orders of the step coordinator --

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

    def status(self, training_term: int = 0, *, with_picture: bool = False) -> ExpertActorStatus:
        with self._state_lock:
            training = self._training.state if self._training.has_begun else None
            # Read before the experts: a version that is named meanwhile is another one, and not one without experts.
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
                rss_bytes=psutil.Process().memory_info().rss,
                checkpoint=self._checkpoint,
                picture=self._picture if with_picture else b"",
                work=replace(self._work, queue_rows=self._queue.rows),
                other_versions=self._hosted.other_versions(weight_version),
            )

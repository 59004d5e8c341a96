"""Computes the batches queued for an actor's experts, merged where possible, and replies to each."""

import threading
import time
from collections.abc import Callable, Sequence

from torch import nn

from moecluster.errors import DeadlineExceeded, InvalidMessage, MoeClusterError, StaleRequest
from moecluster.expert import compute
from moecluster.expert.queue import ComputeQueue, Waiting
from moecluster.expert.store import ExpertStore
from moecluster.expert.training import ExpertTraining
from moecluster.metrics import Metrics
from moecluster.rpc.expert.interface import Reply
from moecluster.types import ActorWork, ComputeBatch, ComputeResult, Phase, PlacementNumber

JOIN_TIMEOUT_S = 10.0
MAX_ROWS_AT_ONCE = 256  # computed by a stream's own thread; for more it wakes the compute thread and reads on


class ExpertComputing:
    """One thread at a time computes: its own, or that of a stream."""

    def __init__(
        self,
        actor: str,
        incarnation: str,
        queue: ComputeQueue,
        hosted: ExpertStore,
        training: ExpertTraining,
        state_lock: threading.RLock,
        *,
        run: Callable[[], compute.RunExpert],
        placement: Callable[[], PlacementNumber],
        metrics: Metrics | None,
    ) -> None:
        """Starts the compute thread; close() ends it. state_lock: held while a batch is computed. run: returns the
        function that runs an expert. placement: returns the number of the newest placement that this actor received."""
        self._actor = actor
        self._incarnation = incarnation
        self._queue = queue
        self._hosted = hosted
        self._training = training
        self._state_lock = state_lock
        self._run = run
        self._placement = placement
        self._metrics = metrics
        self._turn = threading.Lock()  # held from taking out of the queue to the reply
        self._work = ActorWork()  # replaced whole by the computing thread
        self._thread = threading.Thread(target=self._compute_forever, name=f"compute-{actor}", daemon=True)
        self._thread.start()

    @property
    def work(self) -> ActorWork:
        """Totals since the start."""
        return self._work

    @property
    def is_computing(self) -> bool:
        """Whether a thread computes a batch or replies to it."""
        return self._turn.locked()

    def submit(self, batch: ComputeBatch, reply: Reply, *, wake: bool = True) -> None:
        """Queues a batch; a full queue replies Exhausted at once. wake=False: the caller calls compute_waiting()
        next."""
        try:
            self._queue.put(Waiting(batch=batch, reply=reply, arrived_s=time.monotonic()), wake=wake)
        except MoeClusterError as exc:
            reply(exc)

    def compute_waiting(self) -> None:
        """Computes queued batches in the calling thread if there are few rows and no thread computes; else wakes its
        own.

        Saves small batches the hand-off to another thread, which on an idle core takes as long as computing them.
        """
        if self._queue.rows <= MAX_ROWS_AT_ONCE and self._turn.acquire(blocking=False):
            try:
                self._compute_next()
            finally:
                self._turn.release()
        self._queue.wake()  # for batches of other callers, which found this thread computing

    def close(self) -> None:
        """Computes the queued batches, then stops."""
        self._queue.close()
        self._thread.join(JOIN_TIMEOUT_S)

    def _compute_forever(self) -> None:
        while self._queue.wait():
            with self._turn:
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
        except Exception as exc:  # an error of torch or a user's own expert fails these batches, not the actor
            outcomes = [MoeClusterError(f"the computation failed: {exc}")] * len(fresh)
        for waiting, outcome in zip(fresh, outcomes, strict=True):
            waiting.reply(outcome)
        pairs, busy_s = sum(len(w.batch.pair_rows_P) for w in fresh), time.perf_counter() - started_s
        runs = len(set().union(*(w.batch.experts for w in fresh)))  # an expert runs once for all merged batches
        self._count(taken, waited_s=waited_s, pairs=pairs, runs=runs, busy_s=busy_s)
        if self._metrics is not None:
            self._metrics.count_computed(self._actor, pairs=pairs, runs=runs, busy_s=busy_s)
            for waiting, outcome in zip(fresh, outcomes, strict=True):
                batch = waiting.batch
                if isinstance(outcome, ComputeResult) and batch.phase is not Phase.BACKWARD and batch.experts:
                    self._metrics.count_replica_tokens(batch.layer, batch.experts, batch.pair_counts)

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
                results = compute.forward(experts, [batches[i] for i in ready], self._run())
                outcomes.update(zip(ready, results, strict=True))
            return [outcomes[i] for i in range(len(batches))]

    def _experts_of(self, batch: ComputeBatch) -> dict[int, nn.Module]:
        experts = self._hosted.layer(batch.layer, batch.experts, self._placement(), batch.weight_version)
        parameter = next(experts[batch.experts[0]].parameters(), None)
        if parameter is not None and parameter.dtype != batch.x_ND.dtype:
            raise InvalidMessage("x.dtype", f"{batch.x_ND.dtype}, and the experts are {parameter.dtype}")
        width = self._hosted.widths[batch.layer]
        if batch.x_ND.shape[1] != width:
            raise InvalidMessage("x.shape", f"rows of {batch.x_ND.shape[1]}, and the experts take {width}")
        return experts

    def _compute_training(self, batch: ComputeBatch) -> ComputeResult:
        self._training.check_begun()
        experts = self._experts_of(batch)
        if batch.incarnation and batch.incarnation != self._incarnation:
            raise StaleRequest(f"this is incarnation {self._incarnation}, not {batch.incarnation}")
        return self._training.compute(experts, batch, self._run())

"""One layer's exchange with the expert actors: sends, waits, and resends what failed until the deadline."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.permute import DispatchPart, dispatch
from moecluster.dispatch.replica_choice import LayerTable
from moecluster.errors import (
    AttemptAborted,
    DeadlineExceeded,
    Exhausted,
    ExpertsLost,
    MoeClusterError,
    NotHosted,
    StaleRequest,
    Unavailable,
)
from moecluster.metrics import Metrics
from moecluster.rpc.expert.interface import ExpertTransport
from moecluster.types import ActorAddress, ComputeBatch, ComputeResult, Placement

POLL_AGAIN_S = 0.5  # wait for a newer placement before retrying a failed actor
BACKOFF_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)

MakeBatch = Callable[[DispatchPart, Placement, float], ComputeBatch]
Answers = list[tuple[DispatchPart, ComputeResult]]


class _Failure(Enum):
    """Why a message failed, for failures that a retry may fix. The values are the metric's reasons."""

    BUSY = "exhausted"  # backpressure: retry the same actor a little later
    NOT_HOSTED = "not_hosted"  # the actor answers, but does not have the expert
    STALE = "stale"  # the weight version is gone, or another incarnation of the actor is at the address
    UNREACHABLE = "unavailable"
    TOO_LATE = "deadline"


_FAILURES: dict[type[MoeClusterError], _Failure] = {
    Exhausted: _Failure.BUSY,
    NotHosted: _Failure.NOT_HOSTED,
    StaleRequest: _Failure.STALE,
    Unavailable: _Failure.UNREACHABLE,
    DeadlineExceeded: _Failure.TOO_LATE,
}


def _classify(error: MoeClusterError) -> _Failure | None:
    """The kind of failure; None if a retry cannot help."""
    return next((failure for kind, failure in _FAILURES.items() if isinstance(error, kind)), None)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A message in flight, or one that could not be sent."""

    part: DispatchPart
    address: ActorAddress
    transport: ExpertTransport | None
    batch: ComputeBatch
    future: "Future[ComputeResult]"
    sent_s: float


class Exchange:
    """Sends parts to actors and gathers their replies."""

    def __init__(self, pool: ExpertPool, *, timeout_s: float, metrics: Metrics | None = None) -> None:
        self.pool = pool
        self._timeout_s = timeout_s
        self._metrics = metrics

    def send_with_failover(
        self,
        layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        make_batch: MakeBatch,
        timeout_s: float = math.inf,
    ) -> Answers:
        """Returns replies that cover every kept assignment, sorted by actor.

        Forward only: failed assignments go to another replica, or wait until the experts are served again. Raises
        DeadlineExceeded after the shorter timeout. Raises at once what no retry can fix: StaleRequest if the weight
        version is gone, ExpertsLost if experts are lost and the controller cannot reload them.
        """
        deadline_s = time.monotonic() + min(timeout_s, self._timeout_s)
        failover = _Failover(self.pool, layer, deadline_s, self.pool.suspects(self.pool.placement(self._timeout_s)))
        split = partial(dispatch, x_TD=x_TD, ids_TK=ids_TK, weights_TK=weights_TK)
        slots_P: npt.NDArray[np.int64] | None = None  # None: all
        answers: Answers = []
        for attempt in itertools.count():
            placement, parts = failover.plan(partial(split, slots_P=slots_P))
            failed = []
            for message in [self._send(part, placement, make_batch, deadline_s) for part in parts]:
                try:
                    answers.append((message.part, self._wait(message, deadline_s)))
                except MoeClusterError as exc:
                    failure = _classify(exc)
                    if failure is None or (failure is _Failure.STALE and message.transport is not None):
                        raise  # the weight version is gone; without a transport, only that incarnation of the actor is
                    self._count_retry(failure)
                    failed.append(message.part.pair_slots_P.numpy())
                    failover.note(message, placement, failure, exc, attempt)
            if not failed:
                break
            slots_P = np.sort(np.concatenate(failed))
        if attempt:
            answers.sort(key=lambda answer: (answer[0].actor, answer[0].experts))
        return answers

    def send_pinned(self, planned: Sequence[tuple[DispatchPart, Placement]], make_batch: MakeBatch) -> Answers:
        """Returns replies from exactly the incarnations named by the placements; for training.

        Retries only with the same incarnation of the same actor, which recognizes a repeated message by its key. Raises
        AttemptAborted if that incarnation is gone or does not answer.
        """
        deadline_s = time.monotonic() + self._timeout_s
        sent = [self._send(part, placement, make_batch, deadline_s) for part, placement in planned]
        return [
            (message.part, self._pinned_answer(message, placement, make_batch, deadline_s))
            for message, (_, placement) in zip(sent, planned, strict=True)
        ]

    def _pinned_answer(
        self, message: Sent, placement: Placement, make_batch: MakeBatch, deadline_s: float
    ) -> ComputeResult:
        actor, attempt = message.address.actor, 0
        while True:
            try:
                return self._wait(message, deadline_s)
            except MoeClusterError as exc:
                failure = _classify(exc)
                if failure is None:
                    raise
                if failure in (_Failure.UNREACHABLE, _Failure.TOO_LATE):
                    self.pool.drop(message.address, message.transport, exc)
                if failure not in (_Failure.BUSY, _Failure.UNREACHABLE):
                    raise AttemptAborted(f"{actor}: {exc}") from exc
                if failure is _Failure.UNREACHABLE and attempt >= len(BACKOFF_S):
                    raise AttemptAborted(f"{actor} is gone: {exc}") from exc
                self._count_retry(failure)
                _back_off(attempt, deadline_s, exc)
                message = self._send(message.part, placement, make_batch, deadline_s)
                attempt += 1

    def ask(
        self, parts: Sequence[DispatchPart], placement: Placement, make_batch: MakeBatch, timeout_s: float
    ) -> list[ComputeResult | MoeClusterError]:
        """Asks each part's actor once; returns its reply or its error."""
        deadline_s = time.monotonic() + min(timeout_s, self._timeout_s)
        outcomes: list[ComputeResult | MoeClusterError] = []
        for message in [self._send(part, placement, make_batch, deadline_s) for part in parts]:
            try:
                outcomes.append(self._wait(message, deadline_s))
            except MoeClusterError as exc:
                outcomes.append(exc)
        return outcomes

    def _send(self, part: DispatchPart, placement: Placement, make_batch: MakeBatch, deadline_s: float) -> Sent:
        address = placement.actors[part.actor]
        batch = make_batch(part, placement, max(deadline_s - time.monotonic(), 1e-3))
        transport = None
        future: Future[ComputeResult]
        try:
            transport = self.pool.transport(address)
            future = transport.submit(batch)
        except MoeClusterError as exc:
            future = Future()
            future.set_exception(exc)
        return Sent(
            part=part, address=address, transport=transport, batch=batch, future=future, sent_s=time.monotonic()
        )

    def _wait(self, message: Sent, deadline_s: float) -> ComputeResult:
        try:
            result = message.future.result(timeout=max(deadline_s - time.monotonic(), 0.0))
        except TimeoutError as exc:
            waited_s = message.batch.deadline_s
            raise DeadlineExceeded(f"{message.address.actor} did not answer in {waited_s:.3g} s") from exc
        if self._metrics is not None and message.transport is not None:
            self._metrics.count_dispatch(
                actor=message.address.actor,
                transport=message.transport.name,
                seconds=time.monotonic() - message.sent_s,
                sent_bytes=_size_bytes(message.batch.x_ND, message.batch.grad_ND),
                received_bytes=_size_bytes(result.y_ND, result.y_PD, result.grad_x_ND),
            )
        return result

    def _count_retry(self, failure: _Failure) -> None:
        if self._metrics is not None:
            self._metrics.count_retry(failure.value)


class _Failover:
    """The retry state of one exchange: which actors to avoid, and how long to wait."""

    def __init__(self, pool: ExpertPool, layer: int, deadline_s: float, failing: dict[str, MoeClusterError]) -> None:
        """failing: actors to avoid while other replicas are left, and why."""
        self._pool = pool
        self._layer = layer
        self._deadline_s = deadline_s
        self._failing = failing
        self._last: MoeClusterError | None = None

    def plan(
        self, split: Callable[[LayerTable], tuple[DispatchPart, ...]]
    ) -> tuple[Placement, tuple[DispatchPart, ...]]:
        """Splits the assignments by the newest placement; waits while some expert has no replica to ask."""
        while True:
            placement = self._pool.placement(_left(self._deadline_s, self._last))
            try:
                return placement, split(self._pool.table(placement, self._layer, self._failing.keys()))
            except NotHosted as exc:
                if not self._failing:  # no actor has them, not even one that fails
                    if placement.problem:
                        raise ExpertsLost(placement.problem) from exc
                    self._pool.want(self._layer, exc.experts)
                self._last = next(iter(self._failing.values()), exc)
                self._wait_for_change(placement, self._last)
                self._failing = {}

    def note(
        self, message: Sent, placement: Placement, failure: _Failure, error: MoeClusterError, attempt: int
    ) -> None:
        """Records that a message failed; waits if the same actor is to be asked again."""
        self._last = error
        if failure is _Failure.BUSY:
            _back_off(attempt, self._deadline_s, error)
        elif isinstance(error, NotHosted) and error.placement > placement.number:
            self._wait_for_change(placement, error)
        else:
            self._failing[message.address.actor] = error
            if failure is _Failure.NOT_HOSTED:
                self._pool.report(message.address, error)
            else:
                self._pool.drop(message.address, message.transport, error)

    def _wait_for_change(self, placement: Placement, reason: MoeClusterError) -> None:
        self._pool.wait_for_change(placement.number, min(POLL_AGAIN_S, _left(self._deadline_s, reason)))


def _back_off(attempt: int, deadline_s: float, reason: MoeClusterError) -> None:
    time.sleep(min(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)], _left(deadline_s, reason)))


def plan_all(
    pool: ExpertPool,
    layer: int,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    timeout_s: float,
) -> list[tuple[DispatchPart, Placement]]:
    """Splits all kept assignments by the current placement. Raises AttemptAborted if an expert has no replica."""
    placement = pool.placement(timeout_s)
    try:
        parts = dispatch(pool.table(placement, layer), x_TD, ids_TK, weights_TK)
    except NotHosted as exc:
        raise AttemptAborted(str(exc)) from exc
    return [(part, placement) for part in parts]


def _left(deadline_s: float, last: MoeClusterError | None) -> float:
    """Seconds left. Raises DeadlineExceeded, naming the last failure."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded(f"the experts did not answer in time{f': {last}' if last else ''}")
    return left_s


def _size_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)

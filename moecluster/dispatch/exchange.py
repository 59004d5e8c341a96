"""One layer's exchange with the expert actors: send, wait, and send again what failed, until the deadline."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.permute import DispatchPart, dispatch
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

POLL_AGAIN_S = 0.5  # how long a wait for a newer placement lasts before an actor that failed is tried once more
BACKOFF_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)

MakeBatch = Callable[[DispatchPart, Placement, float], ComputeBatch]
Answers = list[tuple[DispatchPart, ComputeResult]]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A message under way, or one that could not even be sent."""

    part: DispatchPart
    address: ActorAddress
    transport: ExpertTransport | None
    batch: ComputeBatch
    future: "Future[ComputeResult]"
    sent_s: float


class Exchange:
    """Sends parts to actors and gathers their answers."""

    def __init__(self, pool: ExpertPool, *, timeout_s: float, metrics: Metrics | None = None) -> None:
        self.pool = pool
        self._timeout_s = timeout_s
        self._metrics = metrics

    def route(
        self,
        layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        make_batch: MakeBatch,
        timeout_s: float = math.inf,
    ) -> Answers:
        """Answers that cover every kept assignment, in the order of the actors.

        Pure forward only: what fails goes to another replica, or waits until the experts are served again. Raises
        DeadlineExceeded when nothing helped within the shorter timeout, and at once what no repetition can mend:
        StaleRequest if the weight version is gone, ExpertsLost if experts are, and the controller cannot load them.
        """
        deadline_s = time.monotonic() + min(timeout_s, self._timeout_s)
        answers: Answers = []
        slots_P: npt.NDArray[np.int64] | None = None  # None: all
        # Actors to avoid, until there is nobody else to ask.
        failing: dict[str, MoeClusterError] = self.pool.suspects(self.pool.placement(self._timeout_s))
        last: MoeClusterError | None = None
        attempt = 0
        while True:
            placement = self.pool.placement(_left(deadline_s, last))
            try:
                table = self.pool.table(placement, layer, failing.keys())
                parts = dispatch(table, x_TD, ids_TK, weights_TK, slots_P=slots_P)
            except NotHosted as exc:
                if not failing:  # they stand nowhere, not even on an actor that does not answer
                    if placement.problem:
                        raise ExpertsLost(placement.problem) from exc
                    self.pool.want(layer, exc.experts)
                last = next(iter(failing.values()), exc)
                self.pool.wait_for_change(placement.number, min(POLL_AGAIN_S, _left(deadline_s, last)))
                failing = {}
                continue
            sent = [self._send(part, placement, make_batch, deadline_s) for part in parts]
            lost = []
            for message in sent:
                try:
                    answers.append((message.part, self._wait(message, deadline_s)))
                except (Exhausted, NotHosted, Unavailable, DeadlineExceeded, StaleRequest) as exc:
                    if isinstance(exc, StaleRequest) and message.transport is not None:
                        raise  # the weight version is gone; without a way there, it is the actor's incarnation that is
                    last = exc
                    lost.append(message.part.pair_slots_P.numpy())
                    self._note_failure(message, placement, exc, failing, attempt, deadline_s)
            if not lost:
                break
            slots_P = np.sort(np.concatenate(lost))
            attempt += 1
        if attempt:
            answers.sort(key=lambda answer: (answer[0].actor, answer[0].experts))
        return answers

    def _note_failure(
        self,
        message: Sent,
        placement: Placement,
        error: MoeClusterError,
        failing: dict[str, MoeClusterError],
        attempt: int,
        deadline_s: float,
    ) -> None:
        self._count_retry(error)
        if isinstance(error, Exhausted):  # backpressure: the same actor, a little later
            pause_s = min(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)], _left(deadline_s, error))
            time.sleep(pause_s)
            return
        if isinstance(error, NotHosted) and error.placement > placement.number:
            self.pool.wait_for_change(placement.number, min(POLL_AGAIN_S, _left(deadline_s, error)))
            return
        failing[message.address.actor] = error
        if isinstance(error, NotHosted):
            self.pool.report(message.address, error)
        else:
            self.pool.drop(message.address, message.transport, error)

    def once(self, sent_before: Sequence[tuple[DispatchPart, Placement]], make_batch: MakeBatch) -> Answers:
        """Answers of exactly the actors' incarnations that are named by the placements; for training.

        A message is repeated only to the same incarnation of the same actor, which knows it by its key. Raises
        AttemptAborted if that incarnation is gone or does not answer.
        """
        deadline_s = time.monotonic() + self._timeout_s
        sent = [self._send(part, placement, make_batch, deadline_s) for part, placement in sent_before]
        answers: Answers = []
        for first in sent:
            message, attempt = first, 0
            while True:
                try:
                    answers.append((message.part, self._wait(message, deadline_s)))
                    break
                except (Exhausted, Unavailable) as exc:
                    if isinstance(exc, Unavailable):
                        self.pool.drop(message.address, message.transport, exc)
                        if attempt >= len(BACKOFF_S):
                            raise AttemptAborted(f"{message.address.actor} is gone: {exc}") from exc
                    self._count_retry(exc)
                    time.sleep(min(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)], _left(deadline_s, exc)))
                    attempt += 1
                    placement = next(p for part, p in sent_before if part is message.part)
                    message = self._send(message.part, placement, make_batch, deadline_s)
                except (NotHosted, StaleRequest, DeadlineExceeded) as exc:
                    if isinstance(exc, DeadlineExceeded):
                        self.pool.drop(message.address, message.transport, exc)
                    raise AttemptAborted(f"{message.address.actor}: {exc}") from exc
        return answers

    def ask(
        self, parts: Sequence[DispatchPart], placement: Placement, make_batch: MakeBatch, timeout_s: float
    ) -> list[ComputeResult | MoeClusterError]:
        """What exactly these actors answer, each asked once, or why one did not."""
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
                transport=message.transport.name,
                seconds=time.monotonic() - message.sent_s,
                sent_bytes=_size_bytes(message.batch.x_ND, message.batch.grad_ND),
                received_bytes=_size_bytes(result.y_ND, result.y_PD, result.grad_x_ND),
            )
        return result

    def _count_retry(self, error: MoeClusterError) -> None:
        if self._metrics is not None:
            self._metrics.count_retry(RETRY_REASONS.get(type(error), "other"))


RETRY_REASONS = {
    Exhausted: "exhausted",
    NotHosted: "not_hosted",
    StaleRequest: "stale",
    Unavailable: "unavailable",
    DeadlineExceeded: "deadline",
}


def plan_all(
    pool: ExpertPool,
    layer: int,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    timeout_s: float,
) -> list[tuple[DispatchPart, Placement]]:
    """Where every kept assignment goes by the current placement. Raises AttemptAborted if an expert has no replica."""
    placement = pool.placement(timeout_s)
    try:
        parts = dispatch(pool.table(placement, layer), x_TD, ids_TK, weights_TK)
    except NotHosted as exc:
        raise AttemptAborted(str(exc)) from exc
    return [(part, placement) for part in parts]


def _left(deadline_s: float, last: MoeClusterError | None) -> float:
    """Seconds left. Raises DeadlineExceeded, saying what failed last."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded(f"the experts did not answer in time{f': {last}' if last else ''}")
    return left_s


def _size_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)

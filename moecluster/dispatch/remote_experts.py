"""Runs a trunk's experts on their actors: the forward pass, and the autograd Function for training."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from moecluster.dispatch.call_context import CallContext, TrainingCalls, call_context, calls_in
from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.exchange import Answers, Exchange, MakeBatch, plan_all
from moecluster.dispatch.load_counts import LoadCounts
from moecluster.dispatch.nonfinite_replies import LayerRows, NonFiniteReplies, without_lost_rows
from moecluster.dispatch.permute import DispatchPart, combine, combine_gradients, combine_pairs, rows_of
from moecluster.dispatch.routing_entropy import routing_entropy
from moecluster.errors import RequestFailed, UserError
from moecluster.metrics import Metrics
from moecluster.moe.experts.finiteness import is_finite
from moecluster.types import ComputeBatch, MessageKey, MicroBatchTag, Phase, Placement, StepTag

OnLost = Callable[[int, int, Mapping[int, str]], None]  # layer, its number of rows, lost row -> reason


@dataclass(frozen=True, kw_only=True)
class _LayerCall:
    """One training call of one layer, kept for its backward."""

    layer: int
    tag: MicroBatchTag
    sent: tuple[tuple[DispatchPart, Placement], ...]


class RemoteExperts:
    """The backend that moecluster.models.trunk attaches to a model's MoE layers. Thread-safe."""

    def __init__(
        self,
        pool: ExpertPool,
        *,
        timeout_s: float = 60.0,
        batch_invariant: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        """timeout_s: limit for one layer's exchange, retries included."""
        self.pool = pool
        self.loads = LoadCounts()
        self._timeout_s = timeout_s
        self._batch_invariant = batch_invariant
        self._metrics = metrics
        self._exchange = Exchange(pool, timeout_s=timeout_s, metrics=metrics)
        self._nonfinite = NonFiniteReplies(self._exchange, metrics)
        # Without a leaf that requires grad, a frozen trunk records no graph and experts get no gradient.
        self._anchor = torch.zeros((), requires_grad=True)
        self._lock = threading.Lock()
        self._sent: dict[StepTag, dict[str, list[MessageKey]]] = {}

    def __call__(
        self,
        layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        weight_version: int = 0,
        on_lost: OnLost | None = None,
    ) -> torch.Tensor:
        """y_TD in x_TD's dtype. Assignments with an index >= E are skipped.

        weight_version: of the experts, outside of training; 0: the served one. on_lost: outside of training, called
        with the rows for which every replica of an expert returns NaN or infinity, and these become zeros; without
        on_lost they raise RequestFailed. Raises DeadlineExceeded, StaleRequest if the version is gone for good, or
        inside training() AttemptAborted.
        """
        ids_TK = ids_TK.detach().to(device="cpu", dtype=torch.int64)
        context = call_context()
        timeout_s = min(context.deadline_s - time.monotonic(), self._timeout_s)
        self._count(context, layer, ids_TK, weights_TK, timeout_s)
        if context.training is not None and torch.is_grad_enabled():
            tag = context.training.next_tag(layer)
            y_TD: torch.Tensor = _RemoteMoe.apply(self._anchor, x_TD, weights_TK, self, layer, ids_TK, tag)
            return y_TD
        if torch.is_grad_enabled() and (x_TD.requires_grad or weights_TK.requires_grad):
            raise UserError(
                "remote experts: gradients are wanted outside of a training step; "
                "run the forward under torch.no_grad(), or inside RemoteExperts.training(...)"
            )
        with torch.no_grad():
            return self._forward(layer, x_TD, ids_TK, weights_TK, timeout_s, weight_version, on_lost)

    @contextmanager
    def training(self, tag: StepTag, *, rank: int = 0, micro_batch: int = 0) -> Iterator[None]:
        """Records this thread's calls inside the with block for backward, under the attempt's tag."""
        calls = TrainingCalls(MicroBatchTag(step=tag, rank=rank, micro_batch=micro_batch))
        with calls_in(replace(call_context(), training=calls)):
            yield

    @contextmanager
    def counting(self) -> Iterator[LoadCounts]:
        """Also counts the assignments of this thread's calls inside the with block separately."""
        counts, context = LoadCounts(), call_context()
        with calls_in(replace(context, counts=(*context.counts, counts))):
            yield counts

    @contextmanager
    def within(self, timeout_s: float) -> Iterator[None]:
        """This thread's calls inside the with block, except training calls, raise DeadlineExceeded after the
        timeout."""
        with calls_in(replace(call_context(), deadline_s=time.monotonic() + timeout_s)):
            yield

    def sent(self, tag: StepTag) -> dict[str, list[MessageKey]]:
        """The backward messages of an attempt, by actor, that Reduce must expect."""
        with self._lock:
            return {actor: list(keys) for actor, keys in self._sent.get(tag, {}).items()}

    def forget(self, tag: StepTag) -> None:
        """Drops the records of an ended attempt and of older ones."""
        with self._lock:
            for old in [t for t in self._sent if t <= tag]:
                del self._sent[old]

    def close(self) -> None:
        self.pool.close()

    def _count(
        self, context: CallContext, layer: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor, timeout_s: float
    ) -> None:
        num_experts = self.pool.placement(timeout_s).layer_experts.get(layer, 0)
        counts_E = np.bincount(ids_TK.numpy().reshape(-1), minlength=num_experts)
        dropped, counts_E = int(counts_E[num_experts : num_experts + 1].sum()), counts_E[:num_experts]
        for counts in (self.loads, *context.counts):
            counts.add(layer, counts_E)
        if self._metrics is not None:
            self._metrics.count_assignments(layer, counts_E)
            if dropped:
                self._metrics.count_dropped(layer, dropped)
            if ids_TK.shape[1] > 1:
                sent_TK = weights_TK.detach().cpu().float().masked_fill(ids_TK >= num_experts, 0.0)
                total, tokens = routing_entropy(sent_TK.numpy())
                if tokens:
                    self._metrics.add_router_entropy(layer, total=total, tokens=tokens)

    def _forward(
        self,
        layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        timeout_s: float,
        weight_version: int,
        on_lost: OnLost | None,
    ) -> torch.Tensor:
        deadline_s = time.monotonic() + timeout_s
        x_cpu_TD, weights_cpu_TK = x_TD.cpu(), weights_TK.to(device="cpu", dtype=torch.float32)

        def make_batch(part: DispatchPart, placement: Placement, deadline_s: float) -> ComputeBatch:
            batch = _batch(layer, Phase.FORWARD, part, placement, deadline_s, x_cpu_TD, self._batch_invariant)
            return replace(batch, weight_version=weight_version)

        answers = self._exchange.send_with_failover(layer, x_cpu_TD, ids_TK, weights_cpu_TK, make_batch, timeout_s)
        y_TD = self._combine(answers, weights_cpu_TK, x_cpu_TD)
        if not is_finite(y_TD):

            def make_pairs(rows_TD: torch.Tensor) -> MakeBatch:
                return lambda part, placement, left_s: replace(
                    _batch(layer, Phase.FORWARD, part, placement, left_s, rows_TD, True), weight_version=weight_version
                )

            asked = LayerRows(layer=layer, x_TD=x_cpu_TD, ids_TK=ids_TK, weights_TK=weights_cpu_TK)
            left_s = max(deadline_s - time.monotonic(), 0.0)
            mended = self._nonfinite.mend(asked, answers, make_pairs, left_s)
            y_TD = self._combine(mended.answers, weights_cpu_TK, x_cpu_TD)
            y_TD, lost = without_lost_rows(y_TD, asked, mended.lost)
            if lost and on_lost is None:
                raise RequestFailed(next(iter(lost.values())))
            if lost and on_lost is not None:
                on_lost(layer, len(y_TD), lost)
        return y_TD.to(x_TD.device)

    def _combine(self, answers: Answers, weights_TK: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        if self._batch_invariant:
            return combine_pairs(answers, weights_TK, x_TD)
        return combine(answers, x_TD)

    def train_forward(
        self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, tag: MicroBatchTag
    ) -> tuple[torch.Tensor, _LayerCall]:
        """y_TD, and what backward needs. All on the CPU, weights_TK float32."""
        planned = plan_all(self.pool, layer, x_TD, ids_TK, weights_TK, self._timeout_s)

        def make_batch(part: DispatchPart, placement: Placement, deadline_s: float) -> ComputeBatch:
            return _batch(layer, Phase.TRAIN_FORWARD, part, placement, deadline_s, x_TD, self._batch_invariant, tag)

        answers = self._exchange.send_pinned(planned, make_batch)
        call = _LayerCall(layer=layer, tag=tag, sent=tuple(planned))
        return self._combine(answers, weights_TK, x_TD), call

    def backward(
        self, call: _LayerCall, x_TD: torch.Tensor, weights_TK: torch.Tensor, grad_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(grad_x_TD, grad_w_TK); the experts keep their own gradients."""

        def make_batch(part: DispatchPart, placement: Placement, deadline_s: float) -> ComputeBatch:
            return _batch(call.layer, Phase.BACKWARD, part, placement, deadline_s, x_TD, False, call.tag, grad_TD)

        answers = self._exchange.send_pinned(call.sent, make_batch)
        with self._lock:
            by_actor = self._sent.setdefault(call.tag.step, {})
            for part, _ in answers:
                key = MessageKey(
                    rank=call.tag.rank,
                    micro_batch=call.tag.micro_batch,
                    layer=call.layer,
                    pass_index=call.tag.pass_index,
                    rows=len(part.rows_N),
                )
                by_actor.setdefault(part.actor, []).append(key)
        return combine_gradients(answers, grad_TD, weights_TK)


def _batch(
    layer: int,
    phase: Phase,
    part: DispatchPart,
    placement: Placement,
    deadline_s: float,
    x_TD: torch.Tensor,
    unsummed: bool,
    tag: MicroBatchTag | None = None,
    grad_TD: torch.Tensor | None = None,
) -> ComputeBatch:
    return ComputeBatch(
        request_id=0,  # given by the transport
        layer=layer,
        phase=phase,
        x_ND=rows_of(part, x_TD),
        experts=part.experts,
        pair_counts=part.pair_counts,
        pair_rows_P=part.pair_rows_P,
        pair_weights_P=part.pair_weights_P,
        deadline_s=deadline_s,
        placement=placement.number,
        train=tag,
        # Training is pinned to one incarnation of an actor: another one lacks the gradients accumulated so far.
        incarnation=placement.actors[part.actor].incarnation if tag is not None else "",
        grad_ND=rows_of(part, grad_TD) if grad_TD is not None else None,
        unsummed=unsummed,
    )


class _RemoteMoe(torch.autograd.Function):
    """An MoE layer with remote experts. The anchor only ensures that a graph is recorded."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        remote: RemoteExperts,
        layer: int,
        ids_TK: torch.Tensor,
        tag: MicroBatchTag,
    ) -> torch.Tensor:
        ctx.remote = remote
        weights_cpu_TK = weights_TK.to(device="cpu", dtype=torch.float32)
        y_TD, ctx.call = remote.train_forward(layer, x_TD.cpu(), ids_TK, weights_cpu_TK, tag)
        ctx.save_for_backward(x_TD, weights_TK)
        return y_TD.to(x_TD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weights_TK = ctx.saved_tensors
        grad_x_TD, grad_w_TK = ctx.remote.backward(
            ctx.call, x_TD.cpu(), weights_TK.to(device="cpu", dtype=torch.float32), grad_TD.cpu()
        )
        grad_x_TD = grad_x_TD.to(x_TD.device)
        grad_w_TK = grad_w_TK.to(device=weights_TK.device, dtype=weights_TK.dtype)
        return None, grad_x_TD, grad_w_TK, None, None, None, None

"""What holds for calls of MoE layers beside their rows: one frozen record, in one context variable.

A new thread starts with the default record, and so do the threads in which autograd runs the backward pass of tensors
that are not on the CPU. Whoever wants another thread to inherit the record runs it in `contextvars.copy_context()`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from moecluster.dispatch.load_counts import LoadCounts
from moecluster.types import MicroBatchTag


class RowWatcher(Protocol):
    """What an engine wants to know of its batches."""

    def see(self, layer: int, ids_TK: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.bool_] | None:
        """A layer is about to send its rows. Returns which rows are to be computed; None: all."""

    def lost(self, layer: int, num_rows: int, reasons: Mapping[int, str]) -> None:
        """No replica answered these of a layer's rows with finite numbers, and why: they go on as zeros."""


class TrainingCalls:
    """Numbers the forward calls of each layer in one micro-batch: gradient checkpointing repeats them."""

    def __init__(self, tag: MicroBatchTag) -> None:
        self._tag = tag
        self._passes: dict[int, int] = {}  # layer -> its calls so far

    def next_tag(self, layer: int) -> MicroBatchTag:
        number = self._passes.get(layer, 0)
        self._passes[layer] = number + 1
        return replace(self._tag, pass_index=number)


@dataclass(frozen=True, kw_only=True)
class CapturedCall:
    """What a layer's experts were asked, and what they answered."""

    y_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CallContext:
    """Replaced as a whole, by `calls_in`."""

    training: TrainingCalls | None = None  # None: outside of a training step
    counts: tuple[LoadCounts, ...] = ()  # that count these calls beside the router's own
    deadline_s: float = math.inf  # time.monotonic(); not for training, whose deadline is the step's
    watcher: RowWatcher | None = None
    captured: list[CapturedCall] | None = None  # takes the calls; None: they are not kept


_OUTSIDE = CallContext()
_CONTEXT: ContextVar[CallContext] = ContextVar("moecluster.dispatch.call_context", default=_OUTSIDE)


def call_context() -> CallContext:
    """The record of this thread, or of the context that it runs in."""
    return _CONTEXT.get()


def set_call_context(context: CallContext) -> None:
    """From now on it holds for this thread."""
    _CONTEXT.set(context)


@contextmanager
def calls_in(context: CallContext) -> Iterator[None]:
    """Inside, it holds for this thread."""
    token = _CONTEXT.set(context)
    try:
        yield
    finally:
        _CONTEXT.reset(token)

"""Settings of MoE layer calls that do not travel as arguments: one frozen record in one context variable.

A new thread starts with the default record, and so do the threads in which autograd runs the backward pass of tensors
that are not on the CPU. To pass the record on to another thread, run that thread in `contextvars.copy_context()`.
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
    """Lets an engine observe the MoE layer calls of its batches."""

    def see(self, layer: int, ids_TK: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.bool_] | None:
        """Called before a layer sends its rows. Returns the mask of rows to compute; None: all."""

    def lost(self, layer: int, num_rows: int, reasons: Mapping[int, str]) -> None:
        """Called with the rows (and the reason for each) for which no replica returned finite numbers; they become
        zeros."""


class TrainingCalls:
    """Numbers each layer's forward calls within one micro-batch, since gradient checkpointing repeats them."""

    def __init__(self, tag: MicroBatchTag) -> None:
        self._tag = tag
        self._passes: dict[int, int] = {}  # layer -> its calls so far

    def next_tag(self, layer: int) -> MicroBatchTag:
        number = self._passes.get(layer, 0)
        self._passes[layer] = number + 1
        return replace(self._tag, pass_index=number)


@dataclass(frozen=True, kw_only=True)
class CapturedCall:
    """The inputs and the output of one call of a layer's experts."""

    y_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CallContext:
    """Never changed in place: `calls_in` and `set_call_context` replace it."""

    training: TrainingCalls | None = None  # None: outside of a training step
    counts: tuple[LoadCounts, ...] = ()  # these count the calls in addition to the router's own counts
    deadline_s: float = math.inf  # time.monotonic(); not for training, whose deadline is the step's
    watcher: RowWatcher | None = None
    captured: list[CapturedCall] | None = None  # calls are appended here; None: not captured


_OUTSIDE = CallContext()
_CONTEXT: ContextVar[CallContext] = ContextVar("moecluster.dispatch.call_context", default=_OUTSIDE)


def call_context() -> CallContext:
    """The record of the current context: a thread's own unless it runs in a copied one."""
    return _CONTEXT.get()


def set_call_context(context: CallContext) -> None:
    """Sets this thread's record from now on."""
    _CONTEXT.set(context)


@contextmanager
def calls_in(context: CallContext) -> Iterator[None]:
    """Sets this thread's record inside the with block."""
    token = _CONTEXT.set(context)
    try:
        yield
    finally:
        _CONTEXT.reset(token)

"""Experts on their way into an actor: out of a checkpoint here, out of another actor in peer_copy.py."""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moecluster.errors import InvalidMessage
from moecluster.experts.base import Expert
from moecluster.hf.shard import ExpertShard
from moecluster.models.expert_source import ExpertSource
from moecluster.roles.controller_orders import LoadOrder
from moecluster.types import ActorAddress, ExpertId, OptimizerSettings

RETURN_EVERY_BYTES = 16 * 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What a load is to bring, and from where."""

    experts: Sequence[ExpertId]
    checkpoint: str  # a directory; of a copy from a peer too: it says what experts of the model are
    dtype: str  # float32 | bfloat16 | float16; empty: float32
    weight_version: int  # 0: what the actor serves, or if it serves nothing, the peer
    replace: bool  # also what is here already in that version
    optimizer: OptimizerSettings | None  # None: the experts are served, not trained
    training_term: int
    peer: ActorAddress | None
    max_bytes_per_s: int  # of a copy from a peer; 0: as fast as it goes


@dataclass(frozen=True, kw_only=True)
class ArrivedExpert:
    """An expert that is ready for a slot."""

    expert: ExpertId
    module: nn.Module
    weight_version: int | None = None  # None: nobody said


def wanted_dtype(source: ExpertSource, experts: Sequence[ExpertId], dtype: str) -> torch.dtype:
    """The dtype of an order. Raises InvalidMessage for an unknown one, and for experts that the model does not have."""
    sizes = {layer.layer: layer.num_experts for layer in source.layers}
    unknown = [str(e) for e in experts if not 0 <= e.index < sizes.get(e.layer, 0)]
    if unknown:
        raise InvalidMessage(f"experts: the model has no {', '.join(unknown[:5])} (layer/index)")
    if (dtype or "float32") not in DTYPES:
        raise InvalidMessage(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    return DTYPES[dtype or "float32"]


def read_experts(
    source: ExpertSource, experts: Sequence[ExpertId], dtype: str, order: LoadOrder, *, trainable: bool
) -> Iterator[ArrivedExpert]:
    """Experts out of a checkpoint, one by one; packed unless they are trained.

    Raises InvalidMessage, before any is read; CheckpointError; StaleOrder and DeadlineExceeded of the order.
    """
    checked_dtype = wanted_dtype(source, experts, dtype)

    def read() -> Iterator[ArrivedExpert]:
        for expert in experts:
            order.check(expert)
            if expert not in order.dropped:
                yield ArrivedExpert(expert=expert, module=source.load(expert, checked_dtype))

    yield from finish(read(), trainable=trainable)


def finish(arrived: Iterable[ArrivedExpert], *, trainable: bool) -> Iterator[ArrivedExpert]:
    """Makes experts ready for their slots: all have the same form, wherever they come from."""
    brought_bytes = 0  # since freed memory was returned
    for expert in arrived:
        module = expert.module.requires_grad_(trainable)
        brought_bytes += sum(p.numel() * p.element_size() for p in module.parameters())
        if brought_bytes >= RETURN_EVERY_BYTES:
            return_freed_memory()
            brought_bytes = 0
        if not trainable and isinstance(module, ExpertShard | Expert):
            module.pack()
        yield expert
    return_freed_memory()


def return_freed_memory() -> None:
    """Gives memory that reading, packing and unloading have freed back to the system, where the C library can (glibc).

    By itself it keeps holes between experts: half as much again as the experts, when they have tens of megabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

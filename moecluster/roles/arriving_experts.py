"""Experts on their way into an actor: out of a checkpoint here, out of another actor in peer_copy.py."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from moecluster.errors import InvalidMessage
from moecluster.models.expert_source import ExpertSource
from moecluster.models.read_ahead import read_ahead
from moecluster.roles.controller_orders import LoadOrder
from moecluster.roles.freed_memory import RETURN_EVERY_BYTES, return_freed_memory
from moecluster.roles.packer import Packer
from moecluster.types import ActorAddress, ExpertId, OptimizerSettings

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
    source: ExpertSource, experts: Sequence[ExpertId], dtype: str, order: LoadOrder, packer: Packer | None
) -> Iterator[ArrivedExpert]:
    """Experts out of a checkpoint, in order. packer: None for experts that are trained.

    Raises InvalidMessage, before any is read; CheckpointError; StaleOrder and DeadlineExceeded of the order.
    """
    checked_dtype = wanted_dtype(source, experts, dtype)

    wanted = (expert for expert in experts if expert not in order.dropped)
    read = read_ahead(source, wanted, checked_dtype, check=order.check)
    yield from finish((ArrivedExpert(expert=expert, module=module) for expert, module in read), packer)


def finish(arrived: Iterable[ArrivedExpert], packer: Packer | None) -> Iterator[ArrivedExpert]:
    """Makes experts ready for their slots: all have the same form, wherever they come from.

    packer: None for experts that are trained.
    """
    brought_bytes = 0  # since freed memory was returned
    with packer.held() if packer is not None else nullcontext():
        for expert in arrived:
            module = expert.module.requires_grad_(packer is None)
            brought_bytes += sum(p.numel() * p.element_size() for p in module.parameters())
            if brought_bytes >= RETURN_EVERY_BYTES:
                return_freed_memory()
                brought_bytes = 0
            if packer is not None:
                packer.take(module)
            yield expert
    return_freed_memory()

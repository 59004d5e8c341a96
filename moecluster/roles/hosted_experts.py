"""The experts that an actor holds, and how they come to it."""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moecluster.errors import InvalidMessage, NotHosted
from moecluster.experts.base import Expert
from moecluster.hf.shard import ExpertShard
from moecluster.models.expert_source import ExpertSource
from moecluster.types import ExpertId

RETURN_EVERY_BYTES = 16 * 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """An expert in a slot."""

    module: nn.Module
    size_bytes: int


class HostedExperts:
    """Experts by id. Thread-safe; a module once read stays valid for who holds it."""

    def __init__(self) -> None:
        self._hosted: dict[ExpertId, Hosted] = {}
        self._layers: dict[int, dict[int, nn.Module]] = {}  # replaced whole at each change, read without the lock
        self._lock = threading.Lock()

    def layer(self, layer: int, experts: Sequence[int], placement: tuple[int, int]) -> dict[int, nn.Module]:
        """The layer's experts by index. Raises NotHosted, with the actor's placement, if one asked for lacks."""
        hosted = self._layers.get(layer, {})
        missing = [e for e in experts if e not in hosted]
        if missing:
            raise NotHosted(f"experts {missing} of layer {layer} are not here", placement=placement)
        return hosted

    def ids(self) -> tuple[ExpertId, ...]:
        with self._lock:
            return tuple(sorted(self._hosted))

    def size_bytes(self) -> int:
        with self._lock:
            return sum(h.size_bytes for h in self._hosted.values())

    def add(self, expert: ExpertId, module: nn.Module) -> int:
        """Puts an expert into a slot, in place of an older one. Returns its bytes."""
        size_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
        with self._lock:
            self._hosted[expert] = Hosted(module=module, size_bytes=size_bytes)
            self._publish()
        return size_bytes

    def remove(self, expert: ExpertId) -> None:
        with self._lock:
            self._hosted.pop(expert, None)
            self._publish()

    def module(self, expert: ExpertId) -> nn.Module:
        with self._lock:
            hosted = self._hosted.get(expert)
        if hosted is None:
            raise NotHosted(f"expert {expert} is not here")
        return hosted.module

    def _publish(self) -> None:
        layers: dict[int, dict[int, nn.Module]] = {}
        for expert, hosted in self._hosted.items():
            layers.setdefault(expert.layer, {})[expert.index] = hosted.module
        self._layers = layers


def read_experts(
    source: ExpertSource, experts: Sequence[ExpertId], dtype: str, *, trainable: bool
) -> Iterator[tuple[ExpertId, nn.Module]]:
    """Experts out of a checkpoint, one by one; packed unless they are trained.

    Raises InvalidMessage for one that the model does not have, before any is read.
    """
    sizes = {layer.layer: layer.num_experts for layer in source.layers}
    unknown = [str(e) for e in experts if not 0 <= e.index < sizes.get(e.layer, 0)]
    if unknown:
        raise InvalidMessage(f"experts: the model has no {', '.join(unknown[:5])} (layer/index)")
    if (dtype or "float32") not in DTYPES:
        raise InvalidMessage(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    read_bytes = 0  # since freed memory was returned
    for expert in experts:
        module = source.load(expert, DTYPES[dtype or "float32"])
        module.requires_grad_(trainable)
        read_bytes += sum(p.numel() * p.element_size() for p in module.parameters())
        if read_bytes >= RETURN_EVERY_BYTES:
            return_freed_memory()
            read_bytes = 0
        if not trainable and isinstance(module, ExpertShard | Expert):
            module.pack()
        yield expert, module
    return_freed_memory()


def return_freed_memory() -> None:
    """Gives memory that reading and packing have freed back to the system, where the C library can (glibc).

    By itself it keeps holes between experts: half as much again as the experts, when they have tens of megabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

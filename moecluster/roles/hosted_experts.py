"""The experts that an actor holds."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moecluster.errors import NotHosted
from moecluster.types import ExpertId


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """An expert in a slot."""

    module: nn.Module  # its parameters never change, unless it is trained here
    size_bytes: int
    weight_version: int


class HostedExperts:
    """Experts by id. Thread-safe; a module once read stays valid for who holds it."""

    def __init__(self) -> None:
        self.weight_version = 0  # that is served
        self.widths: dict[int, int] = {}  # layer -> D of the rows that its experts take
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

    def add(self, expert: ExpertId, module: nn.Module, weight_version: int = 0) -> int:
        """Puts an expert into a slot, in place of an older one. Returns its bytes."""
        size_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
        with self._lock:
            self._hosted[expert] = Hosted(module=module, size_bytes=size_bytes, weight_version=weight_version)
            self._layers = self._layers | {expert.layer: {**self._layers.get(expert.layer, {}), expert.index: module}}
        return size_bytes

    def remove(self, expert: ExpertId) -> None:
        """Empties the expert's slot; an unknown one is fine."""
        with self._lock:
            if self._hosted.pop(expert, None) is not None:
                left = {index: m for index, m in self._layers[expert.layer].items() if index != expert.index}
                self._layers = self._layers | {expert.layer: left}

    def get(self, expert: ExpertId) -> Hosted:
        """Raises NotHosted."""
        with self._lock:
            hosted = self._hosted.get(expert)
        if hosted is None:
            raise NotHosted(f"expert {expert} is not here")
        return hosted

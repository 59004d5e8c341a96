"""The experts that an actor holds, each in one weight version or, while weights are replaced, in several."""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import nn

from moecluster.errors import NotHosted, StaleRequest
from moecluster.growing import check_ahead
from moecluster.models.experts.source import Origin
from moecluster.types import ExpertId, PlacementNumber


@dataclass(frozen=True, kw_only=True)
class LoadedExpert:
    """An expert in a slot."""

    module: nn.Module  # its parameters never change, unless it is trained here
    size_bytes: int
    weight_version: int
    origin: Origin | None = None  # where on the disk it was read from; None: from elsewhere


class ExpertStore:
    """Experts by weight version and id. Thread-safe; a module once read stays valid for who holds it.

    Version 0 is that of experts which came before anybody named one.
    """

    def __init__(self) -> None:
        self.widths: dict[int, int] = {}  # layer -> D of the rows that its experts take
        self._served = 0  # as the controller says; 0: not said
        self._cluster_state: frozenset[int] = frozenset()  # likewise; empty: not said
        self._hosted: dict[int, dict[ExpertId, LoadedExpert]] = {}  # by version; none is empty
        # (version, layer) -> its experts by index; replaced whole at each change, read without the lock
        self._layers: dict[tuple[int, int], dict[int, nn.Module]] = {}
        self._lock = threading.Lock()

    @property
    def weight_version(self) -> int:
        """The version that is served: the one that the controller named, else the newest that is here."""
        return self._served or max(self._hosted, default=0)

    def check_version(self, version: int) -> None:
        """Raises InvalidMessage for one that is too far above all that were ever here."""
        with self._lock:
            check_ahead(version, max((*self._hosted, *self._cluster_state, self._served)), "weight_version")

    def layer(
        self, layer: int, experts: Sequence[int], placement: PlacementNumber, version: int = 0
    ) -> dict[int, nn.Module]:
        """The layer's experts by index, in a version or (0) in the one that is served.

        Raises NotHosted, with the actor's placement, if one asked for lacks; StaleRequest if its version is gone for
        good.
        """
        wanted = version or self.weight_version
        hosted = self._layers.get((wanted, layer), {})
        missing = [e for e in experts if e not in hosted]
        if missing:
            cluster_state = self._cluster_state or frozenset(self._hosted)
            if wanted not in cluster_state and wanted < max(cluster_state, default=0):
                raise StaleRequest(f"weight version {wanted} is not served any more: {self.weight_version} is")
            named = f" in weight version {wanted}" if version else ""
            raise NotHosted(f"experts {missing} of layer {layer} are not here{named}", placement=placement)
        return hosted

    def ids(self, version: int = 0) -> tuple[ExpertId, ...]:
        """The experts of a version; 0: of the one that is served."""
        with self._lock:
            return tuple(sorted(self._hosted.get(version or self.weight_version, {})))

    def other_versions(self, served: int) -> dict[int, tuple[ExpertId, ...]]:
        """Those that are here beside one of them, with their experts."""
        with self._lock:
            return {v: tuple(sorted(hosted)) for v, hosted in sorted(self._hosted.items()) if v != served}

    def size_bytes(self) -> int:
        """Of all versions; a module that stands in two of them counts once."""
        with self._lock:
            modules = {id(h.module): h.size_bytes for hosted in self._hosted.values() for h in hosted.values()}
            return sum(modules.values())

    def add(self, expert: ExpertId, module: nn.Module, weight_version: int = 0, *, origin: Origin | None = None) -> int:
        """Puts an expert into a slot, in place of an older one of its version. Returns its bytes."""
        size_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
        with self._lock:
            hosted = LoadedExpert(module=module, size_bytes=size_bytes, weight_version=weight_version, origin=origin)
            self._hosted.setdefault(weight_version, {})[expert] = hosted
            at = (weight_version, expert.layer)
            self._layers = self._layers | {at: {**self._layers.get(at, {}), expert.index: module}}
        return size_bytes

    def equal_to(self, expert: ExpertId, origin: Origin) -> LoadedExpert | None:
        """The expert in whatever version was read from the same bytes."""
        with self._lock:
            versions = [hosted[expert] for hosted in self._hosted.values() if expert in hosted]
        return next((hosted for hosted in versions if hosted.origin == origin), None)

    def remove(self, expert: ExpertId) -> None:
        """Empties the expert's slot in every version; an unknown one is fine."""
        with self._lock:
            for version, hosted in list(self._hosted.items()):
                if hosted.pop(expert, None) is not None:
                    at = (version, expert.layer)
                    left = {index: m for index, m in self._layers[at].items() if index != expert.index}
                    self._layers = self._layers | {at: left}
                if not hosted:
                    del self._hosted[version]

    def get(self, expert: ExpertId, version: int = 0) -> LoadedExpert:
        """In a version; 0: in the one that is served. Raises NotHosted."""
        with self._lock:
            hosted = self._hosted.get(version or self.weight_version, {}).get(expert)
        if hosted is None:
            raise NotHosted(f"expert {expert} is not here{f' in weight version {version}' if version else ''}")
        return hosted

    def surplus_versions(self, served: int, cluster_state: Collection[int]) -> set[int]:
        """Versions that are here and do not stand."""
        with self._lock:
            return set(self._hosted) - {served, *cluster_state} if cluster_state else set()

    def keep_versions(self, served: int, cluster_state: Collection[int]) -> frozenset[ExpertId]:
        """From now on served is served, and experts of versions other than those standing are dropped.

        What came before anybody named a version is of the one that is served. Returns the experts that are not served
        any more in the version in which they were.
        """
        with self._lock:
            before = self.weight_version
            was_served = self._hosted.get(before, {})
            self._served, self._cluster_state = served, frozenset(cluster_state)
            if 0 in self._hosted:
                self._rename(0, served)
                before = before or served
            if cluster_state:
                for version in set(self._hosted) - self._cluster_state:
                    del self._hosted[version]
                self._layers = {at: layer for at, layer in self._layers.items() if at[0] in self._cluster_state}
            return frozenset(was_served) if before not in self._hosted else frozenset()

    def _rename(self, version: int, name: int) -> None:
        renamed = {e: replace(h, weight_version=name) for e, h in self._hosted.pop(version).items()}
        self._hosted[name] = {**renamed, **self._hosted.get(name, {})}
        for (of, layer), experts in list(self._layers.items()):
            if of == version:
                self._layers = self._layers | {(name, layer): {**experts, **self._layers.get((name, layer), {})}}
        self._layers = {at: experts for at, experts in self._layers.items() if at[0] != version}

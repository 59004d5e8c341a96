"""The experts loaded in an actor, each in one weight version or, during a weight update, in several."""

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
    origin: Origin | None = None  # where on disk it was read from; None: trained, or copied from a peer


class ExpertStore:
    """Experts by weight version and id. Thread-safe; a module stays valid for a caller that has read it.

    Version 0 holds experts loaded before any version was named.
    """

    def __init__(self) -> None:
        self.widths: dict[int, int] = {}  # layer -> D of the rows that its experts take
        self._served = 0  # named by the controller; 0: none yet
        self._in_use: frozenset[int] = frozenset()  # likewise; empty: none yet
        self._hosted: dict[int, dict[ExpertId, LoadedExpert]] = {}  # by version; none is empty
        # (version, layer) -> its experts by index; replaced whole at each change, read without the lock
        self._layers: dict[tuple[int, int], dict[int, nn.Module]] = {}
        self._lock = threading.Lock()

    @property
    def weight_version(self) -> int:
        """The served version: the one that the controller named, else the newest loaded."""
        return self._served or max(self._hosted, default=0)

    def check_version(self, version: int) -> None:
        """Raises InvalidMessage for a version too far above every known one."""
        with self._lock:
            check_ahead(version, max((*self._hosted, *self._in_use, self._served)), "weight_version")

    def by_layer(self) -> dict[int, frozenset[int]]:
        """Layer -> indices of its loaded experts, in any version."""
        found: dict[int, frozenset[int]] = {}
        for (_, layer), experts in list(self._layers.items()):
            found[layer] = found.get(layer, frozenset()) | experts.keys()
        return found

    def layer(
        self, layer: int, experts: Sequence[int], placement: PlacementNumber, version: int = 0
    ) -> dict[int, nn.Module]:
        """All loaded experts of the layer, by index, in the given version (0: the served one).

        Raises NotHosted, with the actor's placement, if one of `experts` is missing; StaleRequest if the version is no
        longer in use and older than one that is.
        """
        wanted = version or self.weight_version
        hosted = self._layers.get((wanted, layer), {})
        missing = [e for e in experts if e not in hosted]
        if missing:
            in_use = self._in_use or frozenset(self._hosted)
            if wanted not in in_use and wanted < max(in_use, default=0):
                raise StaleRequest(f"weight version {wanted} is not served any more: {self.weight_version} is")
            named = f" in weight version {wanted}" if version else ""
            raise NotHosted(f"experts {missing} of layer {layer} are not here{named}", placement=placement)
        return hosted

    def ids(self, version: int = 0) -> tuple[ExpertId, ...]:
        """The experts loaded in a version; 0: the served one."""
        with self._lock:
            return tuple(sorted(self._hosted.get(version or self.weight_version, {})))

    def other_versions(self, served: int) -> dict[int, tuple[ExpertId, ...]]:
        """The loaded versions except `served`, with their experts."""
        with self._lock:
            return {v: tuple(sorted(hosted)) for v, hosted in sorted(self._hosted.items()) if v != served}

    def size_bytes(self) -> int:
        """Bytes of all versions; a module shared by versions counts once."""
        with self._lock:
            modules = {id(h.module): h.size_bytes for hosted in self._hosted.values() for h in hosted.values()}
            return sum(modules.values())

    def add(self, expert: ExpertId, module: nn.Module, weight_version: int = 0, *, origin: Origin | None = None) -> int:
        """Puts an expert into its slot, replacing an older one of the same version. Returns its bytes."""
        size_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
        with self._lock:
            hosted = LoadedExpert(module=module, size_bytes=size_bytes, weight_version=weight_version, origin=origin)
            self._hosted.setdefault(weight_version, {})[expert] = hosted
            at = (weight_version, expert.layer)
            self._layers = self._layers | {at: {**self._layers.get(at, {}), expert.index: module}}
        return size_bytes

    def equal_to(self, expert: ExpertId, origin: Origin) -> LoadedExpert | None:
        """The expert in any version that was read from the same bytes on disk; None if there is none."""
        with self._lock:
            versions = [hosted[expert] for hosted in self._hosted.values() if expert in hosted]
        return next((hosted for hosted in versions if hosted.origin == origin), None)

    def remove(self, expert: ExpertId) -> None:
        """Empties the expert's slot in every version; ignores an unknown expert."""
        with self._lock:
            for version, hosted in list(self._hosted.items()):
                if hosted.pop(expert, None) is not None:
                    at = (version, expert.layer)
                    left = {index: m for index, m in self._layers[at].items() if index != expert.index}
                    self._layers = self._layers | {at: left}
                if not hosted:
                    del self._hosted[version]

    def get(self, expert: ExpertId, version: int = 0) -> LoadedExpert:
        """The expert in a version; 0: the served one. Raises NotHosted."""
        with self._lock:
            hosted = self._hosted.get(version or self.weight_version, {}).get(expert)
        if hosted is None:
            raise NotHosted(f"expert {expert} is not here{f' in weight version {version}' if version else ''}")
        return hosted

    def surplus_versions(self, served: int, in_use: Collection[int]) -> set[int]:
        """Loaded versions that are not in use; none if in_use is empty."""
        with self._lock:
            return set(self._hosted) - {served, *in_use} if in_use else set()

    def keep_versions(self, served: int, in_use: Collection[int]) -> frozenset[ExpertId]:
        """Serves version `served` from now on, and drops experts of versions not in use.

        Version 0 is renamed to `served`. Returns the experts of the version served before, if that version was dropped.
        """
        with self._lock:
            before = self.weight_version
            was_served = self._hosted.get(before, {})
            self._served, self._in_use = served, frozenset(in_use)
            if 0 in self._hosted:
                self._rename(0, served)
                before = before or served
            if in_use:
                for version in set(self._hosted) - self._in_use:
                    del self._hosted[version]
                self._layers = {at: layer for at, layer in self._layers.items() if at[0] in self._in_use}
            return frozenset(was_served) if before not in self._hosted else frozenset()

    def _rename(self, version: int, name: int) -> None:
        renamed = {e: replace(h, weight_version=name) for e, h in self._hosted.pop(version).items()}
        self._hosted[name] = {**renamed, **self._hosted.get(name, {})}
        for (of, layer), experts in list(self._layers.items()):
            if of == version:
                self._layers = self._layers | {(name, layer): {**experts, **self._layers.get((name, layer), {})}}
        self._layers = {at: experts for at, experts in self._layers.items() if at[0] != version}

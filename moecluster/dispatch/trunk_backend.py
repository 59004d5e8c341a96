"""The backend of one trunk: passes its layers' calls on to the experts of its weights, and lets others see them."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from moecluster.dispatch.remote_experts import OnLost, RemoteExperts
from moecluster.errors import UnsupportedModelError


class VersionExperts:
    """The experts in one weight version: a trunk's backend. Thread-safe."""

    def __init__(self, experts: RemoteExperts, version: int) -> None:
        """version: 0 for the one that is served."""
        self.experts = experts
        self.version = version

    def __call__(
        self,
        layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        on_lost: OnLost | None = None,
    ) -> torch.Tensor:
        """As RemoteExperts.__call__."""
        return self.experts(layer, x_TD, ids_TK, weights_TK, weight_version=self.version, on_lost=on_lost)


class RowWatcher(Protocol):
    """What an engine wants to know of its batches."""

    def see(self, layer: int, ids_TK: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.bool_] | None:
        """A layer is about to send its rows. Returns which rows are to be computed; None: all."""

    def lost(self, layer: int, num_rows: int, reasons: Mapping[int, str]) -> None:
        """No replica answered these of a layer's rows with finite numbers, and why: they go on as zeros."""


class TrunkExperts:
    """Thread-safe: every thread has its own watcher, or none."""

    def __init__(self, experts: VersionExperts) -> None:
        """experts: those of the trunk's weights."""
        self.layer_experts: Mapping[int, int] = {}  # MoE layer -> its number of experts, once the trunk is loaded
        self._experts = experts
        self._thread = threading.local()
        self._dry = False

    def __call__(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """As moecluster.hf.interface.Backend says."""
        if self._dry:
            return torch.zeros_like(x_TD)
        watcher: RowWatcher | None = getattr(self._thread, "watcher", None)
        if watcher is not None:
            ids_TK = self._shown(watcher, layer, ids_TK)
        on_lost = watcher.lost if watcher is not None else None
        y_TD = self._experts(layer, x_TD, ids_TK, weights_TK, on_lost=on_lost)
        if getattr(self._thread, "wanted", False):
            self._thread.call = (y_TD, ids_TK, weights_TK)
        return y_TD

    @property
    def weight_version(self) -> int:
        """Of trunk and experts; 0: not known yet."""
        return self._experts.version

    def watch(self, watcher: RowWatcher) -> None:
        """From now on the watcher sees the calls of this thread."""
        self._thread.watcher = watcher

    @contextmanager
    def dry(self) -> Iterator[None]:
        """Inside, no expert is asked: every answer is 0. For trying out a trunk that nothing else uses yet."""
        self._dry = True
        try:
            yield
        finally:
            self._dry = False

    def run(self, block: nn.Module, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(y_TD, ids_TK, weights_TK): what the experts of a block were asked, and said, for these rows."""
        self._thread.wanted, self._thread.call = True, None
        try:
            with torch.no_grad():
                block(x_TD.unsqueeze(0))
        except TypeError as exc:
            raise UnsupportedModelError(f"a {type(block).__name__} takes more than hidden states: {exc}") from exc
        finally:
            self._thread.wanted = False
        assert self._thread.call is not None, "an attached block calls its experts"
        y_TD, ids_TK, weights_TK = self._thread.call
        return y_TD.reshape(len(x_TD), -1), ids_TK, weights_TK

    def _shown(self, watcher: RowWatcher, layer: int, ids_TK: torch.Tensor) -> torch.Tensor:
        ids_TK = ids_TK.detach().to(device="cpu", dtype=torch.int64)
        num_experts = self.layer_experts[layer]
        computed_T = watcher.see(layer, ids_TK.numpy(), num_experts)
        if computed_T is None:
            return ids_TK
        # One beyond what stands for a dropped assignment: nothing was dropped.
        return ids_TK.masked_fill(torch.from_numpy(~computed_T).unsqueeze(1), num_experts + 1)

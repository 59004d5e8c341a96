"""The experts backend of one trunk: forwards its layers' calls to the experts, and lets watchers observe them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from moecluster.dispatch.call_context import CapturedCall, RowWatcher, call_context, calls_in, set_call_context
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import UnsupportedModelError


class TrunkBackend:
    """The experts in one weight version. Thread-safe: each thread has its own watcher, or none."""

    def __init__(self, remote: RemoteExperts, version: int) -> None:
        """version: 0 for the served one."""
        self.version = version  # of trunk and experts; 0: unknown yet
        self.layer_experts: Mapping[int, int] = {}  # MoE layer -> its number of experts, once the trunk is loaded
        self._remote = remote
        self._dry = False

    def __call__(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Implements moecluster.hf.interface.Backend. Raises what RemoteExperts.__call__ raises."""
        if self._dry:
            return torch.zeros_like(x_TD)
        context = call_context()
        watcher = context.watcher
        if watcher is not None:
            ids_TK = self._shown(watcher, layer, ids_TK)
        y_TD = self._remote(
            layer,
            x_TD,
            ids_TK,
            weights_TK,
            weight_version=self.version,
            on_lost=watcher.lost if watcher is not None else None,
        )
        if context.captured is not None:
            context.captured.append(CapturedCall(y_TD=y_TD, ids_TK=ids_TK, weights_TK=weights_TK))
        return y_TD

    def watch(self, watcher: RowWatcher) -> None:
        """Attaches a watcher to this thread's calls from now on."""
        set_call_context(replace(call_context(), watcher=watcher))

    @contextmanager
    def capture(self) -> Iterator[list[CapturedCall]]:
        """Yields a list that collects this thread's calls inside the with block."""
        captured: list[CapturedCall] = []
        with calls_in(replace(call_context(), captured=captured)):
            yield captured

    @contextmanager
    def dry(self) -> Iterator[None]:
        """Inside the with block, calls of any thread return zeros and ask no expert. For trying out a trunk that
        nothing else uses yet."""
        self._dry = True
        try:
            yield
        finally:
            self._dry = False

    def run(self, block: nn.Module, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs a block on these rows; returns the (y_TD, ids_TK, weights_TK) of its experts' call."""
        with self.capture() as calls:
            try:
                with torch.no_grad():
                    block(x_TD.unsqueeze(0))
            except TypeError as exc:
                raise UnsupportedModelError(f"a {type(block).__name__} takes more than hidden states: {exc}") from exc
        assert calls, "an attached block calls its experts"
        return calls[-1].y_TD.reshape(len(x_TD), -1), calls[-1].ids_TK, calls[-1].weights_TK

    def _shown(self, watcher: RowWatcher, layer: int, ids_TK: torch.Tensor) -> torch.Tensor:
        ids_TK = ids_TK.detach().to(device="cpu", dtype=torch.int64)
        num_experts = self.layer_experts[layer]
        computed_T = watcher.see(layer, ids_TK.numpy(), num_experts)
        if computed_T is None:
            return ids_TK
        # num_experts marks a dropped assignment; these are not counted as dropped, so they get the next index.
        return ids_TK.masked_fill(torch.from_numpy(~computed_T).unsqueeze(1), num_experts + 1)

"""Interface of the router, as its server sees it."""

from collections.abc import Iterator
from typing import Protocol

import torch

from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.types import RouterStatus


class RouterHandler(Protocol):
    """Handles the calls of the router service."""

    def generate(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        """Yields the chunks of a request as they are generated."""

    def cancel(self, request_id: str) -> bool:
        """Ends a request. Returns False for an unknown id."""

    def moe(self, layer: int, x_TD: torch.Tensor, timeout_s: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (y_TD, ids_TK, weights_TK) of one MoE layer. timeout_s: infinite means the router's own timeout."""

    def status(self) -> RouterStatus:
        """Returns the router's status."""

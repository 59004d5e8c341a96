"""Interface of the router, as its server sees it."""

from collections.abc import Iterator
from typing import Protocol

import torch

from moecluster.generation import GenerationPiece, GenerationRequest
from moecluster.types import RouterStatus


class RouterHandler(Protocol):
    """What stands behind the service."""

    def generate(self, request: GenerationRequest) -> Iterator[GenerationPiece]:
        """The pieces of a text as they come."""

    def cancel(self, request_id: str) -> bool:
        """Ends a generation; False if none of that name runs."""

    def moe(self, layer: int, x_TD: torch.Tensor, timeout_s: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(y_TD, ids_TK, weights_TK) of one MoE layer, within the time; infinite: the router's own."""

    def status(self) -> RouterStatus:
        """What the router says of itself."""

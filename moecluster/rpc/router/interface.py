"""Interface of the router, as its server sees it."""

from collections.abc import Iterator
from typing import Protocol

import torch

from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.rpc.router.training_messages import RunProgress, StartRequest
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

    def reload(self, model_dir: str) -> None:
        """Loads trunk and tokenizer from another directory, whose experts the controller has. Raises UserError."""


class TrainingHandler(Protocol):
    """Hosts at most one training run."""

    def start(self, request: StartRequest) -> None:
        """Begins a run. Does nothing if the run of this id has begun. Raises UserError, also if another is going on."""

    def progress(self, run_id: str, since: int) -> RunProgress:
        """Returns the run's events from number `since` on. Raises StateLost if this process has no such run."""

    def stop(self, run_id: str) -> None:
        """Ends the run after its current event. Does nothing if this process has no such run."""

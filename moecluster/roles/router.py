"""The router: a model's trunk whose experts are elsewhere, and the generations that run on it."""

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moecluster.errors import CheckpointError, Exhausted, InvalidMessage, MoeClusterError, UnsupportedModelError
from moecluster.generations import GenerationPiece, GenerationRequest
from moecluster.hf.interface import moe_layers
from moecluster.metrics import Metrics
from moecluster.models.checkpoint import OpenCheckpoint, open_checkpoint
from moecluster.models.trunk import load_trunk
from moecluster.roles.generation import Generation
from moecluster.roles.remote_experts import RemoteExperts
from moecluster.types import RouterStatus

MAX_RUNNING = 16
JOIN_TIMEOUT_S = 5.0


class Router:
    """Generates text, and computes single MoE layers. Thread-safe; generations run side by side."""

    def __init__(
        self,
        path: str | Path,
        experts: RemoteExperts,
        *,
        name: str = "router",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        max_running: int = MAX_RUNNING,
        metrics: Metrics | None = None,
        open_elsewhere: OpenCheckpoint | None = None,
    ) -> None:
        """Loads trunk and tokenizer of a model directory. Raises CheckpointError or UnsupportedModelError.

        open_elsewhere: opens checkpoints that this node does not see.
        """
        self.name = name
        self.experts = experts
        self._max_running = max_running
        self._metrics = metrics
        self._tap = _Tap(experts)
        self._dtype, self._device = dtype, device
        self._open_elsewhere = open_elsewhere
        self._lock = threading.Lock()
        self._running: dict[str, Generation] = {}
        self._path, self._model, self._tokenizer = self._load(path)

    def reload(self, path: str | Path) -> None:
        """Takes trunk and tokenizer of another directory; generations that run go on with the old ones."""
        self._path, self._model, self._tokenizer = self._load(path)

    def generate(self, request: GenerationRequest) -> Iterator[GenerationPiece]:
        """The pieces of a text as they come. An iterator that is left early ends its generation.

        Raises InvalidMessage, naming the field, or Exhausted when too many generations run; while it runs, what
        reaching the experts raises.
        """
        try:
            with self._lock:
                model, tokenizer = self._model, self._tokenizer
            prompt_ids = _prompt_ids(request, model, tokenizer)
            with self._lock:
                if request.request_id in self._running:
                    raise InvalidMessage(f"request_id: a generation named {request.request_id} runs already")
                if len(self._running) >= self._max_running:
                    raise Exhausted(f"{self._max_running} generations run already: try again later")
                generation = self._running[request.request_id] = Generation(
                    request,
                    prompt_ids,
                    model=model,
                    tokenizer=tokenizer,
                    experts=self.experts,
                    metrics=self._metrics,
                    on_end=self._forget,
                )
        except MoeClusterError:
            if self._metrics is not None:
                self._metrics.count_request("refused")
            raise
        return generation.pieces()

    def cancel(self, request_id: str) -> bool:
        """Ends a generation at its next token. False if none of that name runs."""
        with self._lock:
            generation = self._running.get(request_id)
        if generation is not None:
            generation.cancel()
        return generation is not None

    def moe(
        self, layer: int, x_TD: torch.Tensor, timeout_s: float = math.inf
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(y_TD, ids_TK, weights_TK) of one MoE layer for raw hidden states: its gate, and its routed experts' sum.

        timeout_s: for the experts' answers, if it is shorter than the router's own. Raises InvalidMessage for a layer
        without experts, or another width or dtype, and DeadlineExceeded.
        """
        model = self._model
        record = next((found for found in moe_layers(model) if found.layer == layer), None)
        if record is None:
            raise InvalidMessage(f"layer: {layer} has no experts")
        width = model.config.get_text_config().hidden_size
        if x_TD.shape[1] != width:
            raise InvalidMessage(f"x.shape: width {x_TD.shape[1]}, and the model's is {width}")
        if x_TD.dtype != self._dtype:
            raise InvalidMessage(f"x.dtype: {x_TD.dtype}, and the model's is {self._dtype}")
        block = model.get_submodule(record.name.rpartition(".")[0])
        with self.experts.within(timeout_s):
            return self._tap.run(block, x_TD.to(self._device))

    def status(self) -> RouterStatus:
        """Never waits; the placement is (0, 0) before the first one."""
        try:
            placement = self.experts.pool.placement(0.0).number
        except MoeClusterError:
            placement = (0, 0)
        return RouterStatus(
            router=self.name,
            model=str(self._path),
            placement=placement,
            running=len(self._running),
            rss_bytes=psutil.Process().memory_info().rss,
        )

    def close(self) -> None:
        """Ends all generations, and the connections to the experts."""
        with self._lock:
            running = list(self._running.values())
        for generation in running:
            generation.cancel()
        for generation in running:
            generation.join(JOIN_TIMEOUT_S)
        self.experts.close()

    def _load(self, path: str | Path) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerBase]:
        checkpoint = open_checkpoint(path, self._open_elsewhere)
        model = load_trunk(checkpoint, self._tap, self._dtype, self._device)
        model.train(False)
        return Path(path), model, load_tokenizer(checkpoint.files.metadata)

    def _forget(self, generation: Generation) -> None:
        with self._lock:
            self._running.pop(generation.request.request_id, None)


class _Tap:
    """The trunk's backend: passes calls on to the experts, and lets `run` see those of its own thread."""

    def __init__(self, experts: RemoteExperts) -> None:
        self._experts = experts
        self._seen = threading.local()

    def __call__(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        y_TD = self._experts(layer, x_TD, ids_TK, weights_TK)
        if getattr(self._seen, "wanted", False):
            self._seen.call = (y_TD, ids_TK, weights_TK)
        return y_TD

    def run(self, block: nn.Module, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the experts of a block were asked, and said, for these rows."""
        self._seen.wanted, self._seen.call = True, None
        try:
            with torch.no_grad():
                block(x_TD.unsqueeze(0))
        except TypeError as exc:
            raise UnsupportedModelError(f"a {type(block).__name__} takes more than hidden states: {exc}") from exc
        finally:
            self._seen.wanted = False
        assert self._seen.call is not None, "an attached block calls its experts"
        y_TD, ids_TK, weights_TK = self._seen.call
        return y_TD.reshape(len(x_TD), -1), ids_TK, weights_TK


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory. Raises CheckpointError."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as exc:
        raise CheckpointError(
            f"{path} has no tokenizer that can be read ({str(exc).splitlines()[0]}); copy its tokenizer files there"
        ) from exc
    return tokenizer


def _prompt_ids(request: GenerationRequest, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt as ids that the model can take, with room for what is to come."""
    ids = list(request.prompt_ids) if request.prompt_ids else list(tokenizer(request.prompt)["input_ids"])
    field = "prompt_ids" if request.prompt_ids else "prompt"
    if not ids:
        raise InvalidMessage(f"{field}: empty, expected at least one token to go on from")
    vocab_size = model.config.get_text_config().vocab_size
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise InvalidMessage(f"{field}: an id outside 0 to {vocab_size - 1}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(ids) + request.max_new_tokens > limit:
        raise InvalidMessage(
            f"{field}: its {len(ids)} tokens and max_new_tokens = {request.max_new_tokens} exceed the model's {limit}"
        )
    return ids

"""The router: a model's trunk over remote experts, and the requests that run on it."""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.dispatch.trunk_backend import TrunkBackend
from moecluster.errors import CheckpointError, InvalidMessage, MoeClusterError
from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.hf.interface import moe_layers
from moecluster.memory import ResidentMemory
from moecluster.metrics import Metrics
from moecluster.models.checkpoint.reader import OpenCheckpoint, open_checkpoint
from moecluster.models.given_directories import IsGiven, check_given
from moecluster.models.tokenizer.load import load_tokenizer, prompt_ids
from moecluster.models.trunk import load_trunk
from moecluster.moe.experts.finiteness import is_finite
from moecluster.router.engine.engine import Engine, EngineLimits
from moecluster.router.engine.factory import make_engine
from moecluster.router.model_versions import ModelVersions
from moecluster.types import NO_PLACEMENT, RouterState, RouterStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A trunk in memory, and the engine that generates with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    experts: TrunkBackend
    engine: Engine


class Router:
    """Serves generation requests, and computes single MoE layers. Thread-safe."""

    def __init__(
        self,
        path: str | Path,
        experts: RemoteExperts,
        *,
        limits: EngineLimits,
        is_given: IsGiven,
        name: str = "router",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        metrics: Metrics | None = None,
        on_change: Callable[[], None] = lambda: None,
        controller: Callable[[], str] = lambda: "",
        open_elsewhere: OpenCheckpoint | None = None,
    ) -> None:
        """Loads trunk and tokenizer of a model directory. Raises NotGiven, CheckpointError or UnsupportedModelError.

        is_given: whether a trunk may be loaded from a directory. on_change: called when the weight versions in state()
        change. controller: returns the controller's current host:port, or "". open_elsewhere: opens checkpoints that
        this node does not see.
        """
        self.name = name
        self.experts = experts
        self._limits = limits
        self._is_given = is_given
        self._metrics = metrics
        self._controller = controller
        self._dtype, self._device = dtype, device
        self._open_elsewhere = open_elsewhere
        self._lock = threading.Lock()
        self._memory = ResidentMemory()
        self._engines: list[Engine] = []  # of all trunks in memory
        self._models = ModelVersions(path, experts, load=self._load, close=self._close, on_change=on_change)
        if metrics is not None:
            metrics.watch_requests(running=lambda: self._count_requests()[0], waiting=lambda: self._count_requests()[1])
            metrics.watch_attention_cache(
                used=lambda: sum(engine.cached_tokens for engine in self._all_engines()),
                room=lambda: sum(engine.max_cached_tokens for engine in self._all_engines()),
            )
            metrics.watch_lanes(name, experts.pool.lanes)

    @property
    def models(self) -> ModelVersions[ServedModel]:
        """The weight versions that requests are generated with, or can be."""
        return self._models

    def reload(self, path: str | Path) -> None:
        """Loads trunk and tokenizer of another directory; running requests keep the old ones."""
        self._models.reload(path)

    def generate(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        """Streams a request's chunks. Closing the iterator early ends the request.

        Raises InvalidMessage, naming the field, Exhausted when too many requests wait, or StaleRequest if the weight
        version that the request started with is not loaded here; while it runs, any error of the remote experts.
        """
        use = None
        try:
            use = self._models.use(version=request.weight_version)
            served = use.model
            ids = prompt_ids(request, served.tokenizer, served.model.config.get_text_config().vocab_size)
            return served.engine.begin(request, ids, on_over=use.release)
        except BaseException as exc:
            if use is not None:
                use.release()
            if self._metrics is not None and isinstance(exc, MoeClusterError):
                self._metrics.count_request("refused")
            raise

    def cancel(self, request_id: str) -> bool:
        """Ends a request. Returns False for an unknown id."""
        return any(engine.cancel(request_id) for engine in self._all_engines())

    def moe(
        self, layer: int, x_TD: torch.Tensor, timeout_s: float = math.inf
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (y_TD, ids_TK, weights_TK) of one MoE layer for raw hidden states: the weighted sum of its routed
        experts, and its gate's choice.

        timeout_s: for the experts' replies, if shorter than the router's own. Raises InvalidMessage for a layer without
        experts, or a wrong width or dtype, and DeadlineExceeded.
        """
        with self._models.use() as use:
            return self._moe(use.model, layer, x_TD, timeout_s)

    def _moe(
        self, served: ServedModel, layer: int, x_TD: torch.Tensor, timeout_s: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        record = next((found for found in moe_layers(served.model) if found.layer == layer), None)
        if record is None:
            raise InvalidMessage("layer", f"{layer} has no experts")
        width = served.model.config.get_text_config().hidden_size
        if x_TD.shape[1] != width:
            raise InvalidMessage("x.shape", f"width {x_TD.shape[1]}, and the model's is {width}")
        if x_TD.dtype != self._dtype:
            raise InvalidMessage("x.dtype", f"{x_TD.dtype}, and the model's is {self._dtype}")
        block = served.model.get_submodule(record.name.rpartition(".")[0])
        with self.experts.within(timeout_s):
            return served.experts.run(block, x_TD.to(self._device))

    def status(self) -> RouterStatus:
        """Never waits; the placement is NO_PLACEMENT before the first one."""
        try:
            placement = self.experts.pool.placement(0.0).number
        except MoeClusterError:
            placement = NO_PLACEMENT
        path, served = self._models.current
        running, waiting = self._count_requests()
        return RouterStatus(
            router=self.name,
            model=str(path),
            weight_version=self._models.in_use().newest,
            placement=placement,
            running=running,
            waiting=waiting,
            max_tokens=served.engine.max_tokens,
            rss_bytes=self._memory.size_bytes(),
            controller=self._controller(),
        )

    def state(self) -> RouterState:
        """The router's report to the controller. Never waits."""
        weights, (running, waiting) = self._models.in_use(), self._count_requests()
        return RouterState(
            router=self.name,
            running=running,
            waiting=waiting,
            weight_version=weights.newest,
            oldest_weight_version=weights.oldest,
            ready_weight_version=weights.ready,
            failed_weight_version=weights.failed,
            problem=weights.problem,
            inline_lanes=tuple(f"{actor}: {why}" for actor, why in self.experts.pool.shortages().items()),
        )

    def close(self) -> None:
        """Ends all requests, and the connections to the experts."""
        for engine in self._all_engines():
            engine.close()
        self._models.close()
        self.experts.close()

    def _count_requests(self) -> tuple[int, int]:
        """Returns (running, waiting) requests of all trunks together."""
        engines = self._all_engines()
        return sum(engine.running for engine in engines), sum(engine.waiting for engine in engines)

    def _all_engines(self) -> list[Engine]:
        with self._lock:
            return list(self._engines)

    def _load(self, path: Path, experts: TrunkBackend) -> ServedModel:
        check_given(str(path), self._is_given)
        checkpoint = open_checkpoint(path, self._open_elsewhere)
        model = load_trunk(checkpoint, experts, self._dtype, self._device)
        model.train(False)
        self._check_finite(model, path, refuse=bool(experts.version))
        experts.layer_experts = {record.layer: record.num_experts for record in moe_layers(model)}
        tokenizer = load_tokenizer(checkpoint.files.metadata)
        engine = make_engine(model, tokenizer, experts, limits=self._limits, metrics=self._metrics)
        with self._lock:
            self._engines.append(engine)
        return ServedModel(model=model, tokenizer=tokenizer, experts=experts, engine=engine)

    def _check_finite(self, model: PreTrainedModel, path: Path, *, refuse: bool) -> None:
        """Raises CheckpointError for a trunk with NaN or infinity if refuse; otherwise logs it."""
        name = next((name for name, value in model.named_parameters() if not _is_finite(value)), None)
        if name is not None:
            problem = f"{path}: the trunk's tensor {name} holds NaN or infinity"
            if refuse:
                raise CheckpointError(problem)
            logger.error("%s: requests that need it fail", problem)

    def _close(self, served: ServedModel) -> None:
        with self._lock:
            self._engines = [engine for engine in self._engines if engine is not served.engine]
        served.engine.close()


def _is_finite(value: torch.Tensor) -> bool:
    if value.is_meta or value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return True
    return is_finite(value.detach()) or bool(torch.isfinite(value).all())

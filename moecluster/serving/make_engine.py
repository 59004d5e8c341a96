"""The engine for a model: continuous batching where its family can, padded batches elsewhere."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moecluster.generations import GenerationRequest
from moecluster.hf.continuous_batching import supports_paging
from moecluster.metrics import Metrics
from moecluster.models.token_bytes import TokenBytes
from moecluster.roles.trunk_experts import TrunkExperts
from moecluster.serving.engine import Engine, EngineLimits
from moecluster.serving.padded_writer import PaddedWriter
from moecluster.serving.paged_writer import PagedWriter
from moecluster.serving.running_text import RunningText

logger = logging.getLogger(__name__)


def make_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    experts: TrunkExperts,
    *,
    limits: EngineLimits,
    metrics: Metrics | None = None,
) -> Engine:
    """model: a trunk that nothing else uses yet; experts: its backend. Takes the room for the paged cache at once."""
    with experts.dry():
        paged = supports_paging(model)
    if not paged:
        logger.info("a %s model is written in padded batches", model.config.model_type)
    make_text = partial(
        _make_text,
        end_ids=end_ids(model),
        tokenizer=tokenizer,
        token_bytes=TokenBytes(tokenizer),
        experts=experts,
        metrics=metrics,
    )
    return Engine(
        partial(PagedWriter if paged else PaddedWriter, model, experts, limits),
        make_text,
        limits,
        max_positions=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )


def end_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, as the checkpoint says."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings is not None else None
    return frozenset(() if ends is None else [ends] if isinstance(ends, int) else map(int, ends))


def _make_text(
    request: GenerationRequest, prompt_ids: Sequence[int], max_new_tokens: int, *, experts: TrunkExperts, **model: Any
) -> RunningText:
    return RunningText(
        request, prompt_ids, max_new_tokens=max_new_tokens, weight_version=experts.weight_version, **model
    )

"""Makes the engine of a model: continuous batching if its family supports it, otherwise padded batches."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moecluster.dispatch.trunk_backend import TrunkBackend
from moecluster.generation import GenerationRequest
from moecluster.hf.continuous_batching import supports_paging
from moecluster.metrics import Metrics
from moecluster.models.tokenizer.decoding import Detokenizer
from moecluster.models.tokenizer.token_bytes import TokenBytes
from moecluster.router.engine.continuous_batching import ContinuousBatchRunner
from moecluster.router.engine.engine import Engine, EngineLimits
from moecluster.router.engine.sequence import TokenSequence
from moecluster.router.engine.static_batching import StaticBatchRunner

logger = logging.getLogger(__name__)


def make_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    experts: TrunkBackend,
    *,
    limits: EngineLimits,
    metrics: Metrics | None = None,
) -> Engine:
    """model: a trunk that nothing else uses yet; experts: its backend. Allocates the paged cache at once."""
    with experts.dry():
        paged = supports_paging(model)
    if not paged:
        logger.info("a %s model is generated in padded batches", model.config.model_type)
    detokenizer = Detokenizer(tokenizer)
    make_sequence = partial(
        _make_sequence,
        end_ids=end_ids(model, tokenizer),
        detokenizer=detokenizer,
        token_bytes=TokenBytes(tokenizer, detokenizer),
        experts=experts,
        metrics=metrics,
    )
    return Engine(
        partial(ContinuousBatchRunner if paged else StaticBatchRunner, model, experts, limits),
        make_sequence,
        limits,
        max_positions=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the tokens that end a sequence: all that generation_config.json, config.json or the tokenizer name."""
    ends = set(_ids(getattr(model.generation_config, "eos_token_id", None)))
    for config in (model.config, model.config.get_text_config()):
        named = getattr(config, "eos_token_id", None)
        # A default of the family's config class counts only if nothing else names one.
        if not ends or named != getattr(type(config), "eos_token_id", None):
            ends.update(_ids(named))
    eos = tokenizer.eos_token
    if eos is not None and tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == eos:  # not <unk> in its place
        ends.add(tokenizer.eos_token_id)
    return frozenset(ends)


def _ids(named: int | Sequence[int] | None) -> Sequence[int]:
    return () if named is None else [named] if isinstance(named, int) else [int(i) for i in named]


def _make_sequence(
    request: GenerationRequest, prompt_ids: Sequence[int], max_new_tokens: int, *, experts: TrunkBackend, **model: Any
) -> TokenSequence:
    return TokenSequence(request, prompt_ids, max_new_tokens=max_new_tokens, weight_version=experts.version, **model)

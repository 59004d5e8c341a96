"""Records of one generation: what is asked for, and what comes back piece by piece."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moecluster.types import ExpertId


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """How the next token is chosen. Every default leaves the model's distribution alone, and takes its best token."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 0.0  # only the smallest set of tokens with this probability; 0: off
    top_k: int = 0  # only so many tokens; 0: off
    min_p: float = 0.0  # only tokens with this part of the best one's probability; 0: off
    seed: int = 0
    repetition_penalty: float = 0.0  # divides the logits of what stands in prompt or text (CTRL, 2019); 0: off
    presence_penalty: float = 0.0  # taken off the logits of what stands in the text, as in OpenAI's API
    frequency_penalty: float = 0.0  # the same, for each time that it does
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to go on from: a text, token ids, or a conversation; and until where."""

    request_id: str
    prompt: str = ""
    prompt_ids: tuple[int, ...] = ()
    messages_json: str = ""  # a JSON list of {"role", "content"}: the checkpoint's chat template makes the prompt
    max_new_tokens: int = 0  # with generated_ids; 0: as many as the model has room for
    stop: tuple[str, ...] = ()  # texts that end the generation, and are not part of it
    ignore_eos: bool = False
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    logprobs: bool = False
    top_logprobs: int = 0  # of how many alternatives at each token
    generated_ids: tuple[int, ...] = ()  # what another router wrote of this text, as it was received
    weight_version: int = 0  # that generated_ids were written with; 0: whatever is served


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token and its log-probability under the model, before sampling parameters."""

    id: int
    logprob: float
    token: bytes  # UTF-8, or a part of a character
    top: "tuple[TokenLogprob, ...]" = ()  # the most likely ones, best first


@dataclass(frozen=True, kw_only=True)
class GenerationPiece:
    """What a generation says at a time. The last piece has a finish_reason."""

    ids: tuple[int, ...] = ()
    text: str = ""  # what became certain with these ids
    logprobs: tuple[TokenLogprob, ...] = ()  # as many as ids, if they were asked for
    weight_version: int = 0  # that writes the text; 0: none has been named
    finish_reason: str = ""  # stop | length | cancelled
    # In the last piece:
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that needed no computing
    experts: Mapping[ExpertId, int] = field(default_factory=dict)  # assignments of all its tokens

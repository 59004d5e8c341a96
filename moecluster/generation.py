"""Records of one generation: the request, and the chunks that come back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moecluster.types import ExpertId


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """How the next token is sampled. By default: greedily, from the model's unchanged distribution."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 0.0  # only the smallest set of tokens with this probability; 0: off
    top_k: int = 0  # only this many of the most likely tokens; 0: off
    min_p: float = 0.0  # only tokens with this fraction of the best one's probability; 0: off
    seed: int = 0
    repetition_penalty: float = 0.0  # divides the logits of prompt and generated tokens (CTRL, 2019); 0: off
    presence_penalty: float = 0.0  # subtracted from the logits of generated tokens, as in OpenAI's API
    frequency_penalty: float = 0.0  # the same, times the token's count
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt (text, token ids or a conversation), and when and how generation ends."""

    request_id: str
    prompt: str = ""
    prompt_ids: tuple[int, ...] = ()
    messages_json: str = ""  # a JSON list of {"role", "content"}: the checkpoint's chat template makes the prompt
    max_new_tokens: int = 0  # generated_ids included; 0: as many as the model has room for
    stop: tuple[str, ...] = ()  # stop strings, not part of the result
    ignore_eos: bool = False
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    logprobs: bool = False
    top_logprobs: int = 0  # number of alternatives at each token
    generated_ids: tuple[int, ...] = ()  # generated at another router, as received: the request continues after them
    weight_version: int = 0  # that generated_ids were generated with; 0: the served one


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token and its log-probability under the model, before sampling parameters."""

    id: int
    logprob: float
    token: bytes  # UTF-8, or a part of a character
    top: "tuple[TokenLogprob, ...]" = ()  # the most likely ones, best first


@dataclass(frozen=True, kw_only=True)
class GenerationChunk:
    """A part of a generation's output. The last chunk has a finish_reason."""

    ids: tuple[int, ...] = ()
    text: str = ""  # what became certain with these ids
    logprobs: tuple[TokenLogprob, ...] = ()  # as many as ids, if requested
    weight_version: int = 0  # that generates the sequence; 0: not named yet
    finish_reason: str = ""  # stop | length | cancelled
    # In the last chunk:
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that needed no computing
    experts: Mapping[ExpertId, int] = field(default_factory=dict)  # assignments of all its tokens

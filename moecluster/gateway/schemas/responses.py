"""Response schemas for the OpenAPI description; the gateway also builds /health and /v1/models from them."""

from typing import Literal

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """Breakdown of the prompt tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobLists(BaseModel):
    """Parallel lists with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One generated choice."""

    index: int
    text: str
    logprobs: CompletionLogprobLists | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Response of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatTokenLogprob(BaseModel):
    """One token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprobs(ChatTokenLogprob):
    """One generated token, with the most likely alternatives."""

    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of one choice."""

    content: list[ChatTokenLogprobs]
    refusal: list[ChatTokenLogprobs]


class ChatMessage(BaseModel):
    """The generated message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One generated choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None  # tokens, prompt and generated together; null: not known yet


class ModelList(BaseModel):
    """Response of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Response of GET /health: 200 if ready or degraded, 503 if a model has no router that answers."""

    status: Literal["ready", "degraded", "not ready"]
    reasons: list[str]  # why it is not ready, or degraded
    routers: dict[str, int]  # model -> routers that answer


class ErrorDetail(BaseModel):
    """The error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Response of every status other than 200, except for /health."""

    error: ErrorDetail

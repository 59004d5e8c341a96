"""The answers' schemas: what the OpenAPI description promises, and what is built whole."""

from typing import Literal

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobLists(BaseModel):
    """Side by side, an entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobLists | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatTokenLogprob(BaseModel):
    """One token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprobs(ChatTokenLogprob):
    """One token of the text, with what could have stood there."""

    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(BaseModel):
    """Of one text."""

    content: list[ChatTokenLogprobs]
    refusal: list[ChatTokenLogprobs]


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One text."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None  # prompt and continuation together, in tokens; none: not known yet


class ModelList(BaseModel):
    """Of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Of GET /health: 200 while texts are written, if not as they should be; 503 if nobody writes them."""

    status: Literal["ready", "degraded", "not ready"]
    reasons: list[str]  # why it is not ready, or not wholly
    routers: dict[str, int]  # model -> routers that answer


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer other than 200."""

    error: ErrorDetail

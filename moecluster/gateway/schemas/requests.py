"""Request bodies: OpenAI's fields, with vLLM's extras. The gateway accepts exactly what these schemas allow.

Types are strict: "5" is no number. For unsupported fields see known_fields.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, Strict
from pydantic_core import PydanticCustomError

from moecluster.gateway.schemas.known_fields import (
    CHAT,
    COMPLETION,
    MESSAGE,
    STREAM_OPTIONS,
    TEXT_PART,
    UNSUPPORTED,
    Fields,
)
from moecluster.rpc.router.messages import (
    MAX_BIASES,
    MAX_NEW_TOKENS,
    MAX_PENALTY,
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPT_IDS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOP_K,
    MAX_TOP_LOGPROBS,
    MIN_REPETITION_PENALTY,
)

MAX_CHOICES = 128  # of one request
MAX_MESSAGES = 4096
MAX_ID = 2**31 - 1
DEFAULT_MAX_TOKENS = 16  # of a completion, as in OpenAI's API


def _whole(value: Any) -> Any:
    """Converts 5.0 to 5: JSON does not tell them apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _encodable(value: str) -> str:
    """Refuses half of a surrogate pair, which JSON can express but UTF-8 cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise PydanticCustomError("text", "a text with a surrogate that is no character") from exc
    return value


class FirstError(FailFast):
    """Reports only the first error of a long list of the wrong kind."""

    __hash__ = object.__hash__  # members of a union must be hashable


# Limits come before the Python validators, where they cost nothing.
Text = Annotated[str, Strict(), AfterValidator(_encodable)]
Name = Annotated[str, Strict(), Field(min_length=1, max_length=256), AfterValidator(_encodable)]
Prompt = Annotated[str, Strict(), Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_encodable)]
Prompts = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_CHOICES), FirstError()]
TokenId = Annotated[int, Strict(), Field(ge=0, le=MAX_ID)]
PromptIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_IDS), FirstError()]
PromptIdLists = Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_CHOICES), FirstError()]
Stop = Annotated[str, Strict(), Field(min_length=1, max_length=MAX_STOP_CHARACTERS), AfterValidator(_encodable)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS), FirstError()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
WHOLE = BeforeValidator(_whole)
Flag = Annotated[bool, Strict()]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
MaxTokens = Annotated[int, Strict(), Field(ge=1, le=MAX_NEW_TOKENS), WHOLE]


class StreamOptions(Fields):
    """Options of a streamed response."""

    not_followed = STREAM_OPTIONS

    include_usage: Flag | None = None


class GenerationFields(Fields):
    """Fields of both kinds of requests."""

    objects: ClassVar = {"stream_options": StreamOptions}

    model: Annotated[Name, Field(description="a model name from /v1/models")]
    n: Annotated[int, Strict(), Field(ge=1, le=MAX_CHOICES, description="choices per prompt"), WHOLE] | None = 1
    stream: Flag | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Stops | None = None
    seed: Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63, description="null: random"), WHOLE] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[Number, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_BIASES, description="token id -> bias added to its logit"),
        ]
        | None
    ) = None
    top_k: Annotated[int, Strict(), Field(ge=-1, le=MAX_TOP_K, description="0 or -1: off"), WHOLE] | None = 0
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[Number, Field(ge=MIN_REPETITION_PENALTY, le=MAX_PENALTY)] | None = 1.0
    ignore_eos: Flag | None = False


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    not_followed = COMPLETION

    prompt: Prompt | Prompts | PromptIds | PromptIdLists
    max_tokens: MaxTokens | None = DEFAULT_MAX_TOKENS
    logprobs: Annotated[int, Strict(), Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    echo: Flag | None = False
    best_of: Annotated[int, Strict(), Field(ge=1, le=MAX_CHOICES, description="must equal n"), WHOLE] | None = None


def _text_parts_only(content: Any) -> Any:
    """Raises a clear error for an image or audio part."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(UNSUPPORTED, "only parts of type text are supported")
    return content


class TextPart(Fields):
    """A text part of a message."""

    not_followed = TEXT_PART

    type: Literal["text"]
    text: Text


class Message(Fields):
    """One message of a conversation."""

    not_followed = MESSAGE
    objects: ClassVar = {"content": TextPart}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES), FirstError()],
        BeforeValidator(_text_parts_only),
    ]
    name: Annotated[Name, Field(description="of the speaker, if the model's chat template shows it")] | None = None

    @property
    def parts_or_text(self) -> str | list[dict[str, str]]:
        """The content as it was given: the router knows which form the chat template needs."""
        if isinstance(self.content, str):
            return self.content
        return [{"type": "text", "text": part.text} for part in self.content]


class ChatCompletionRequest(GenerationFields):
    """Body of POST /v1/chat/completions."""

    not_followed = CHAT
    objects: ClassVar = {**GenerationFields.objects, "messages": Message}

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FirstError()]
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = None
    logprobs: Flag | None = False
    top_logprobs: Annotated[int, Strict(), Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None

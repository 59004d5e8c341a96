"""The bodies that the front takes: OpenAI's, with vLLM's extras. What their schema allows is what is taken.

Types are strict: "5" is no number. What becomes of fields that are not followed stands in known_fields.
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

MAX_CHOICES = 128  # texts of one request
MAX_MESSAGES = 4096
MAX_ID = 2**31 - 1
DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI has it


def _whole(value: Any) -> Any:
    """5.0 is an integer to JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _encodable(value: str) -> str:
    """JSON can say half of a surrogate pair, which no text has."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise PydanticCustomError("text", "a text with a surrogate that is no character") from exc
    return value


class FirstError(FailFast):
    """Of a long list of the wrong kind only the first error is noted."""

    __hash__ = object.__hash__  # a part of a union is looked up


# Limits stand before Python's own checks: there they cost nothing.
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
    """How a stream is told."""

    not_followed = STREAM_OPTIONS

    include_usage: Flag | None = None


class Body(Fields):
    """What both kinds of requests have."""

    objects: ClassVar = {"stream_options": StreamOptions}

    model: Annotated[Name, Field(description="as /v1/models lists it")]
    n: Annotated[int, Strict(), Field(ge=1, le=MAX_CHOICES, description="texts of each prompt"), WHOLE] | None = 1
    stream: Flag | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Stops | None = None
    seed: (
        Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63, description="none: another one each time"), WHOLE] | None
    ) = None
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
            Field(max_length=MAX_BIASES, description="token id -> added to its logit"),
        ]
        | None
    ) = None
    top_k: Annotated[int, Strict(), Field(ge=-1, le=MAX_TOP_K, description="0 or -1: off"), WHOLE] | None = 0
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[Number, Field(ge=MIN_REPETITION_PENALTY, le=MAX_PENALTY)] | None = 1.0
    ignore_eos: Flag | None = False


class CompletionBody(Body):
    """POST /v1/completions."""

    not_followed = COMPLETION

    prompt: Prompt | Prompts | PromptIds | PromptIdLists
    max_tokens: MaxTokens | None = DEFAULT_MAX_TOKENS
    logprobs: Annotated[int, Strict(), Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    echo: Flag | None = False
    best_of: Annotated[int, Strict(), Field(ge=1, le=MAX_CHOICES, description="only as many as n"), WHOLE] | None = None


def _text_parts_only(content: Any) -> Any:
    """A clear word where a picture or a sound is sent."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(UNSUPPORTED, "only parts of type text are supported")
    return content


class TextPart(Fields):
    """A part of a message."""

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
    name: Annotated[Name, Field(description="of who says it, where the model's chat template shows it")] | None = None

    @property
    def parts_or_text(self) -> str | list[dict[str, str]]:
        """As it was given: the router knows which of them the chat template wants."""
        if isinstance(self.content, str):
            return self.content
        return [{"type": "text", "text": part.text} for part in self.content]


class ChatBody(Body):
    """POST /v1/chat/completions."""

    not_followed = CHAT
    objects: ClassVar = {**Body.objects, "messages": Message}

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FirstError()]
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = None
    logprobs: Flag | None = False
    top_logprobs: Annotated[int, Strict(), Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None

"""Every field of a body is honored, or asks for the default behavior, or is refused by name."""

import typing
from typing import Any

import openai.types.chat as chat_types
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion import ChatCompletion
from pydantic import ValidationError

from moecluster.gateway.api_errors import api_error_of_validation
from moecluster.gateway.schemas.known_fields import Fields, without_unknown
from moecluster.gateway.schemas.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
    Message,
    StreamOptions,
    TextPart,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "x"}
GOOD: dict[type[GenerationFields], dict[str, Any]] = {ChatCompletionRequest: CHAT, CompletionRequest: COMPLETION}
MESSAGES = (
    chat_types.ChatCompletionDeveloperMessageParam,
    chat_types.ChatCompletionSystemMessageParam,
    chat_types.ChatCompletionUserMessageParam,
    chat_types.ChatCompletionAssistantMessageParam,
)


def refused(body: type[Fields], fields: Any) -> dict[str, Any]:
    with pytest.raises(ValidationError) as wrong:
        body.model_validate(fields)
    error: dict[str, Any] = api_error_of_validation(wrong.value.errors()).body()["error"]
    assert error["code"] == "unsupported_parameter", error
    return error


@pytest.mark.parametrize(
    ("fields", "types"),
    [
        (
            ChatCompletionRequest,
            (chat_params.CompletionCreateParamsStreaming, chat_params.CompletionCreateParamsNonStreaming),
        ),
        (
            CompletionRequest,
            (completion_params.CompletionCreateParamsStreaming, completion_params.CompletionCreateParamsNonStreaming),
        ),
        (StreamOptions, (chat_types.ChatCompletionStreamOptionsParam,)),
        (Message, MESSAGES),
        (TextPart, (chat_types.ChatCompletionContentPartTextParam,)),
    ],
)
def test_every_field_of_openais_client_is_decided_on(fields: type[Fields], types: tuple[Any, ...]) -> None:
    sent = {name for declared in types for name in typing.get_type_hints(declared)}
    assert len(sent) > 1
    assert sent - set(fields.model_fields) - set(fields.not_followed) == set()


@pytest.mark.parametrize(
    "name",
    ["regex", "ebnf", "lora_path", "structural_tag", "repeat_penalty", "best", "Temperature", "", "model_fields", "ü"],
)
@pytest.mark.parametrize("body", list(GOOD))
def test_a_field_that_nobody_knows_is_refused_whatever_its_value(body: type[GenerationFields], name: str) -> None:
    values: tuple[Any, ...] = ("x", None, 0, False, [], {})
    for value in values:
        error = refused(body, {**GOOD[body], name: value})
        assert "unknown field" in error["message"] and error["param"]
        if name.isascii() and name:
            assert error["param"] == name


def test_what_was_meant_is_said_where_it_is_near() -> None:
    for name, meant in (
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("stream_option", "stream_options"),
    ):
        assert f"did you mean {meant}?" in refused(CompletionRequest, {**COMPLETION, name: 1})["message"]
    assert "did you mean prompt?" in refused(CompletionRequest, {"model": "m", "promt": "x"})["message"]
    assert "did you mean" not in refused(CompletionRequest, {**COMPLETION, "zzz": 1})["message"]
    long = refused(CompletionRequest, {**COMPLETION, "x" * 10**6: 1})
    assert len(long["param"]) < 100 and len(long["message"]) < 200


def test_inner_objects_are_as_strict() -> None:
    part = {"type": "text", "text": "a", "cache_control": {}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"stream_options": {"include_usage": True, "every": 1}}, "stream_options.every"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"messages": [*CHAT["messages"], {"role": "user", "content": "a", "weight": 0}]}, "messages[1].weight"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [part]}]}, "messages[0].content[0].cache_control"),
        ({"response_format": {"type": "text", "strict": True}}, "response_format"),
    ]
    for fields, param in cases:
        assert refused(ChatCompletionRequest, {**CHAT, **fields})["param"] == param


@pytest.mark.parametrize("body", list(GOOD))
def test_what_is_not_followed_is_taken_only_where_it_asks_for_nothing(body: type[GenerationFields]) -> None:
    for name, harmless in body.not_followed.items():
        for value in (None, *(harmless or ())):
            body.model_validate({**GOOD[body], name: value})
        if harmless is None:
            body.model_validate({**GOOD[body], name: {"any": 1}})
        else:
            for value in ("other", 7, {"any": 1}, [0]):
                error = refused(body, {**GOOD[body], name: value})
                assert error["param"] == name and "not supported" in error["message"]


def test_a_value_of_another_type_is_not_the_neutral_one() -> None:
    for name, value in (("skip_special_tokens", 1), ("min_tokens", False), ("store", 0), ("tools", {})):
        assert refused(ChatCompletionRequest, {**CHAT, name: value})["param"] == name
    assert "only true" in refused(ChatCompletionRequest, {**CHAT, "skip_special_tokens": False})["message"]


def test_an_answer_is_taken_back_as_a_message() -> None:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a", "refusal": None}}
    answer = ChatCompletion.model_validate(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    )
    for told in (answer.choices[0].message.model_dump(), choice["message"]):
        assert (
            ChatCompletionRequest.model_validate({**CHAT, "messages": [*CHAT["messages"], told]}).messages[1].content
            == "a"
        )


def test_what_nobody_knows_can_be_taken_away_at_every_level() -> None:
    sent = {
        **CHAT, "x": 1, "tools": [{}], "stream_options": {"x": 1, "include_usage": True},
        "messages": [{"role": "user", "x": 1, "content": [{"type": "text", "text": "a", "x": {}}]}, 5, [{"x": 1}]],
    }  # fmt: skip
    assert without_unknown(ChatCompletionRequest, sent) == {
        **CHAT, "tools": [{}], "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, 5, [{"x": 1}]],
    }  # fmt: skip
    assert without_unknown(ChatCompletionRequest, "text") == "text"


def test_the_schema_says_so() -> None:
    for body in GOOD:
        schema = body.model_json_schema()
        assert schema["additionalProperties"] is False
        assert (
            schema["properties"]["skip_special_tokens"] == {"enum": [None, True]} and schema["properties"]["user"] == {}
        )
        assert all(inner["additionalProperties"] is False for inner in schema["$defs"].values())

"""Translation of bodies to router requests, of errors to OpenAI's format, and of chunks to events."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from moecluster.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    Exhausted,
    InvalidMessage,
    MoeClusterError,
    Unavailable,
    UserError,
)
from moecluster.gateway.api_errors import MAX_MESSAGE_CHARACTERS, ApiError, api_error_of, api_error_of_validation
from moecluster.gateway.format_response import ChatFormatter, CompletionFormatter
from moecluster.gateway.logprobs import CompletionLogprobs, chat_logprobs
from moecluster.gateway.middleware import route_of
from moecluster.gateway.parse_request import SEEDS, parse_chat, parse_completion
from moecluster.gateway.schemas.requests import ChatCompletionRequest, CompletionRequest
from moecluster.gateway.sse import event
from moecluster.generation import GenerationChunk, TokenLogprob
from moecluster.rpc.router.messages import decode_generation_request, encode_generation_request

HELLO = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> Any:
    return parse_completion(CompletionRequest.model_validate({"model": "m", "prompt": "x", **fields}))


def chat(**fields: Any) -> Any:
    return parse_chat(ChatCompletionRequest.model_validate({"model": "m", "messages": HELLO, **fields}))


def refused(body: type[CompletionRequest] | type[ChatCompletionRequest], fields: Any) -> dict[str, Any]:
    with pytest.raises(ValidationError) as wrong:
        body.model_validate(fields)
    error: dict[str, Any] = api_error_of_validation(wrong.value.errors()).body()["error"]
    return error


def test_nulls_are_defaults() -> None:
    names = [name for name in CompletionRequest.model_fields if name not in ("model", "prompt")]
    bare, nulls = completion(seed=1).requests[0], completion(**{**dict.fromkeys(names), "seed": 1}).requests[0]
    assert bare.sampling == nulls.sampling and bare.max_new_tokens == nulls.max_new_tokens == 16
    names = [name for name in ChatCompletionRequest.model_fields if name not in ("model", "messages")]
    assert chat(**dict.fromkeys(names)).requests[0].max_new_tokens == 0


def test_what_is_translated_passes_the_routers_own_checks() -> None:
    widest = {
        "n": 128, "temperature": 2, "top_p": 0, "top_k": -1, "min_p": 1, "seed": -(2**63), "logprobs": 20,
        "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 100, "max_tokens": 65536,
        "stop": ["s" * 1024] * 16, "logit_bias": {str(i): (-1) ** i * 100 for i in range(1024)},
    }  # fmt: skip
    for job in (completion(**widest), completion(prompt=[2**31 - 1] * 10), chat(messages=HELLO * 4096)):
        for request in job.requests:
            assert decode_generation_request(encode_generation_request(request)) == request


def test_top_p_0_is_the_best_token_and_1_is_off() -> None:
    assert 0 < completion(top_p=0).requests[0].sampling.top_p < 1e-6
    assert completion(top_p=1).requests[0].sampling.top_p == 0.0


def test_seeds_follow_each_other_around_the_end() -> None:
    seeds = [request.sampling.seed for request in completion(n=3, seed=-2).requests]
    assert seeds == [SEEDS - 2, SEEDS - 1, 0]


def test_a_whole_number_may_be_written_with_a_point_but_a_request_is_no_number() -> None:
    assert completion(max_tokens=5.0).requests[0].max_new_tokens == 5
    for wrong in ("5", True, 5.5, [5]):
        assert refused(CompletionRequest, {"model": "m", "prompt": "x", "max_tokens": wrong})["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("body", "fields", "param", "part"),
    [
        (CompletionRequest, {"model": "m"}, "prompt", "a list of token ids"),
        (CompletionRequest, {"model": "m", "prompt": [1, "a"]}, "prompt", "a list of token ids"),
        (CompletionRequest, {"model": "m", "prompt": "\ud800"}, "prompt", "unicode"),
        (CompletionRequest, {"prompt": "x"}, "model", "required"),
        (CompletionRequest, {"model": "m", "prompt": "x", "suffix": "end"}, "suffix", "not supported"),
        (CompletionRequest, {"model": "m", "prompt": "x", "temperature": float("nan")}, "temperature", "finite"),
        (ChatCompletionRequest, {"model": "m", "messages": [{"role": "x", "content": ""}]},
         "messages[0].role", "assistant"),
        (ChatCompletionRequest, {"model": "m", "messages": HELLO, "tools": [{}]}, "tools", "not supported"),
        (ChatCompletionRequest, {"model": "m", "messages": HELLO, "stream_options": {"include_usage": 1}},
         "stream_options.include_usage", "boolean"),
        (ChatCompletionRequest, [], None, "JSON object"),
    ],
)  # fmt: skip
def test_wrong_bodies_name_what_is_wrong(body, fields, param, part) -> None:
    error = refused(body, fields)
    assert error["param"] == param and part.lower() in error["message"].lower(), error
    assert error["type"] == "invalid_request_error"


def test_a_length_is_given_once() -> None:
    assert chat(max_tokens=3, max_completion_tokens=3).requests[0].max_new_tokens == 3
    with pytest.raises(ApiError, match="max_completion_tokens"):
        chat(max_tokens=3, max_completion_tokens=4)
    with pytest.raises(ApiError, match="top_logprobs"):
        chat(top_logprobs=1)


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (InvalidMessage("prompt_ids", "an id outside 0 to 9"), 400, None, "prompt"),
        (ContextLengthExceeded("prompt_ids", "its 9 tokens and max_new_tokens = 9 exceed the model's 10"), 400,
         "context_length_exceeded", "prompt"),
        (InvalidMessage("prompt", "what its text says, such as: exceed the model's 10, decides nothing"), 400, None,
         "prompt"),
        (InvalidMessage("max_new_tokens", "-1, expected at least 0"), 400, None, "max_tokens"),
        (InvalidMessage("logprobs.logprob", "not a number"), 400, None, "logprobs"),
        (InvalidMessage("", "no field: is named here"), 400, None, None),
        (UserError("checkpoint: no field of a request"), 400, None, None),
        (Exhausted("full", retry_after_s=0.01), 429, "rate_limit_exceeded", None),
        (DeadlineExceeded("late"), 503, "unavailable", None),
        (Unavailable("router at 10.0.0.1:5 is gone"), 503, "unavailable", None),
        (MoeClusterError("router at 10.0.0.1:5: INTERNAL"), 503, "unavailable", None),
    ],
)  # fmt: skip
def test_routers_errors_are_told_in_openais_form(error, status, code, param) -> None:
    refusal = api_error_of(error, "m")
    assert (refusal.status, refusal.code, refusal.param) == (status, code, param)
    assert "10.0.0.1" not in refusal.message and "max_new_tokens" not in refusal.message
    assert (status == 429) <= (refusal.headers is not None and int(refusal.headers["Retry-After"]) == 1)


@pytest.mark.parametrize("field", ["prompt", "prompt_ids", "messages_json"])
def test_a_prompt_is_named_as_in_the_body(field) -> None:
    error = ContextLengthExceeded(field, "its 9 tokens and max_new_tokens = 9 exceed the model's 10")
    refusal = api_error_of(error, "m", prompt_param="messages")
    assert refusal.param == "messages"
    assert refusal.message == "messages: its 9 tokens and max_tokens = 9 exceed the model's 10"


def test_a_refusal_is_short_and_encodable_whatever_it_quotes() -> None:
    refusal = ApiError(400, "\ud800" * 10_000)
    told = json.loads(bytes(refusal.response().body))["error"]["message"]
    assert len(told) <= MAX_MESSAGE_CHARACTERS + 3


def test_an_event_is_one_line_whatever_the_request() -> None:
    told = event({"text": "a\nb\r\u2028\u2029ü\ud83d\ude00"})
    assert told.startswith(b"data: ") and told.endswith(b"\n\n") and len(told.splitlines()) == 2


def test_offsets_count_characters_also_where_a_token_is_a_part_of_one() -> None:
    tokens = [TokenLogprob(id=i, logprob=-1.0, token=part) for i, part in enumerate((b"a", b"\xc3", b"\xbc", b"b"))]
    told = CompletionLogprobs().to_openai(tokens)
    assert told["text_offset"] == [0, 1, 1, 2] and told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xbc", "b"]
    assert [token["bytes"] for token in chat_logprobs(tokens)["content"]] == [[97], [0xC3], [0xBC], [98]]
    lowest = CompletionLogprobs().to_openai([TokenLogprob(id=0, logprob=float("-inf"), token=b"a")])
    assert json.loads(json.dumps(lowest, allow_nan=False))["token_logprobs"] == [-9999.0]


def test_chunks_without_request_are_not_told_but_their_tokens_count() -> None:
    chunks = [
        GenerationChunk(ids=(1,)), GenerationChunk(ids=(2,)), GenerationChunk(ids=(3, 4), text="ab"),
        GenerationChunk(text="c", finish_reason="stop", prompt_tokens=7, cached_tokens=4),
    ]  # fmt: skip
    for formatter_of, job in (
        (CompletionFormatter, completion(stream_options={"include_usage": True})),
        (ChatFormatter, chat()),
    ):
        form = formatter_of(job, "m")
        events = [event for chunk in chunks for event in form.events(0, chunk)]
        assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "stop"]
        whole = formatter_of(job, "m")
        for chunk in chunks:
            whole.add(0, chunk)
        usage = whole.whole()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 4, 11)
        assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
        told = [chunk["usage"] for chunk in form.last_events()]
        assert told == ([usage] if job.include_usage else [])


def test_labels_of_paths_are_few_whatever_is_asked_for() -> None:
    assert route_of("/v1/models/a/b") == "/v1/models/{model}" and route_of("/v1/completions") == "/v1/completions"
    assert route_of("/anything") == route_of("/v1/edits") == "other"

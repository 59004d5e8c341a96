"""HTTP bodies: unknown fields are refused by name, and invalid JSON is a 400, whatever else they contain."""

from typing import Any

import httpx
import openai
import pytest

from tests.support.clusters.running_gateway import running_gateway

COMPLETION: dict[str, Any] = {"model": "model", "prompt": "x", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODIES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


@pytest.mark.parametrize("path", list(BODIES))
def test_what_would_change_the_answer_and_is_not_followed_is_refused(gateway, router, path) -> None:
    asked = len(router.requests)
    for name, value in (
        ("regex", "a+"), ("ebnf", "root"), ("lora_path", "x"), ("include_stop_str_in_output", True),
        ("skip_special_tokens", False), ("return_token_ids", True), ("reasoning_effort", "low"),
        ("structural_tag", "x"), ("prediction", {"type": "content", "content": "x"}), ("repeat_penalty", 2.0),
        ("truncate_prompt_tokens", 3), ("add_special_tokens", path != "/v1/completions"), ("nobody_knows_it", None),
    ):  # fmt: skip
        answer = httpx.post(gateway.url + path, json={**BODIES[path], name: value}, timeout=20.0)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter"), error
    assert len(router.requests) == asked
    answer = httpx.post(f"{gateway.url}{path}?regex=x", json=BODIES[path], headers={"regex": "x"}, timeout=20.0)
    assert answer.status_code == 200, "neither the query nor a header is a field"


def test_unknown_fields_may_be_allowed_but_not_those_that_are_known_and_not_followed(router) -> None:
    with running_gateway([router.address], allow_unknown_fields=True) as gateway, gateway.openai() as client:
        extra: dict[str, Any] = {"regex": "a+", "stream_options": {"include_usage": True, "x": 1}}
        assert client.completions.create(**COMPLETION, extra_body=extra).usage.completion_tokens == 2
        message = {"role": "user", "content": [{"type": "text", "text": "hi", "x": 1}], "x": 1}
        done = client.chat.completions.create(**{**CHAT, "messages": [message]}, extra_body=extra)
        assert done.usage.completion_tokens == 2
        for fields in ({"skip_special_tokens": False}, {"temperature": 9}):
            with pytest.raises(openai.BadRequestError):
                client.completions.create(**COMPLETION, extra_body=fields)


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize(
    ("content", "part", "param"),
    [
        (b'{"model": "model", "prompt": "cut off \\ud83d"}', "half a surrogate pair", "prompt"),
        (b'{"model": "model\\ud800", "prompt": "x"}', "half a surrogate pair", "model"),
        (b'{"model": "model", "prompt": "x", "user": "\\udc00"}', "half a surrogate pair", "user"),
        (b'{"model": "model", "prompt": "x", "\\udc00": 1}', "half a surrogate pair", None),
        (b'{"model": "model", "messages": [{"role": "user", "content": "\\ud83d"}]}', "half", "messages[0].content"),
        (b'{"model": "model", "prompt": "x", "temperature": NaN}', "NaN", None),
        (b'{"model": "model", "prompt": "x", "temperature": 1e999}', "too large", None),
        (b'{"model": "model", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", "digits", None),
        (b'{"model": "model", "prompt": "x", "temperature": 0, "temperature": 2}', '"temperature" appears twice', None),
        (b'{"model": "model", "prompt": "x", "metadata": ' + b"[" * 950 + b"]" * 950 + b"}", "levels", None),
        (b"[" * 100_000, "levels", None),
        (b'{"model": "model", "prompt": "\xff"}', "not UTF-8", None),
        (b'{"model": "model", "prompt": "a\x00"}', "no JSON", None),
        (b'{"model": "model", ', "no JSON", None),
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused_as_such(gateway, path, content, part, param) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(gateway.url + path, content=content, headers=headers, timeout=20.0)
    error = answer.json()["error"]
    assert answer.status_code == 400 and part in error["message"] and error["param"] == param, error


def test_a_byte_order_mark_before_a_body_is_passed_over(gateway) -> None:
    content = b'\xef\xbb\xbf{"model": "model", "prompt": "x"}'
    headers = {"Content-Type": "application/json"}
    assert (
        httpx.post(f"{gateway.url}/v1/completions", content=content, headers=headers, timeout=20.0).status_code == 200
    )

"""A line that cannot be sent, or whose response is malformed, fails alone."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from moecluster.errors import DataError
from moecluster.http_client.batch.journal import Journal, journal_path
from moecluster.http_client.batch.lines import MAX_LINE_BYTES, BatchInput
from moecluster.http_client.batch.run import run_batch
from moecluster.http_client.batch.send import Retries
from moecluster.http_client.connection import message_of, open_gateway

Serve = Callable[[httpx.Request], httpx.Response]


def line(custom_id: str, rest: bytes = b"") -> bytes:
    """An input line. rest: more of its body, verbatim."""
    begin = f'{{"custom_id": "{custom_id}", "method": "POST", "url": "/v1/completions", "body": {{"prompt": "a"'
    return begin.encode() + (b", " + rest if rest else b"") + b"}}\n"


def run(source: Path, out: Path, serve: Serve) -> list[dict[str, Any]]:
    async def send(batch: BatchInput, journal: Journal) -> None:
        transport = httpx.MockTransport(serve)
        async with open_gateway(
            "http://127.0.0.1:1", api_key="", max_connections=2, timeout_s=20.0, transport=transport
        ) as gateway:
            retries = Retries(attempts=1, patience_s=0.0)
            await run_batch(batch, journal, gateway, concurrency=2, retries=retries, on_done=lambda output: None)

    with BatchInput(source) as batch, Journal(out, batch) as journal:
        asyncio.run(send(batch, journal))
        journal.finish()
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def ok(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"said": json.loads(request.content)["prompt"]})


UNSENDABLE = [
    (b'"x": "cut off \\ud83d"', "half a surrogate pair"),
    (b'"\\udc00": 1', "half a surrogate pair"),
    (b'"model": "\\ud800\\ud800"', "half a surrogate pair"),
    (b'"x": "\xed\xa0\xbd"', "not UTF-8"),
    (b'"x": NaN', "NaN"),
    (b'"x": [-Infinity]', "-Infinity"),
    (b'"x": 1e999', "too large"),
    (b'"temperature": 0, "temperature": 2', '"temperature" appears twice'),
]


@pytest.mark.parametrize(("rest", "why"), UNSENDABLE)
def test_a_line_that_cannot_be_sent_is_a_line_with_its_error_and_the_others_are_answered(tmp_path, rest, why) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line("first") + line("bad", rest) + line("last"))
    served: list[bytes] = []

    def serve(request: httpx.Request) -> httpx.Response:
        served.append(request.content)
        return ok(request)

    first, bad, last = run(source, out, serve)
    assert [answer["response"]["body"] for answer in (first, last)] == [{"said": "a"}] * 2 and len(served) == 2
    assert bad["custom_id"] == "bad" and bad["response"] is None
    assert bad["error"]["code"] == "invalid_line" and why in bad["error"]["message"]
    assert "line 2" in bad["error"]["message"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (line("\\ud83d"), '"custom_id": "\\\\ud83d" holds half a surrogate pair'),
        (line("a", b'"x": ' + b"[" * 900 + b"]" * 900), "levels deep"),
        (b"[" * 100_000 + b"\n", "levels deep"),
        (line("a", b'"x": ' + b"1" * 5000), "digits"),
        (line("a", b'"x": "\xff"'), "not UTF-8"),
        (line("a", b'"x": "\x00"'), "no JSON"),
        (b"\x00\x00\n", "no JSON"),
        (b"null\n", "no JSON object"),
        (b'"text"\n', "no JSON object"),
        (line("a", b'"x": "' + b"x" * (2 * MAX_LINE_BYTES) + b'"'), "longer than"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_request_is_named_before_anything_is_sent(tmp_path, content, why) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(line("first") + content + line("last") + b"{\n")
    with pytest.raises(DataError, match=f"nothing was sent; line 2: .*{why}.*; line 4: no JSON") as caught:
        BatchInput(source)
    assert str(caught.value).isprintable()


def test_a_byte_order_mark_and_windows_line_ends_are_passed_over(tmp_path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + line("first").replace(b"\n", b"\r\n") + line("last"))
    assert [answer["custom_id"] for answer in run(source, tmp_path / "out.jsonl", ok)] == ["first", "last"]


def test_what_can_be_read_once_only_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="no regular file"):
        BatchInput(tmp_path)
    with pytest.raises(DataError, match="no regular file"):
        BatchInput(Path("/dev/null"))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"<html>", b"\xff\xfe", b"NaN", b'{"a": NaN}', b'{"a": 1e999}', b'"\\ud83d"', b"[" * 950 + b"]" * 950,
        b"[" * 100_000, b"1" * 6000, b"\x00", b'{"a": 1, "a": 2}', b"\x1b[31mred", b"3", b"null",
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [200, 400, 500])
def test_whatever_is_answered_is_noted_and_can_be_read_again(tmp_path, content, status) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line("only"))
    (answer,) = run(source, out, lambda request: httpx.Response(status, content=content))
    assert answer["response"]["status_code"] == status
    assert "NaN" not in out.read_text() or isinstance(answer["response"]["body"], str), "an output is JSON"
    assert message_of(answer["response"]["body"]).isprintable()
    with BatchInput(source) as batch:
        journal_path(out).write_text("")  # as if this was the journal's last line: it is read again
        with Journal(out, batch) as journal:
            journal.append([(0, answer)])
        with Journal(out, batch) as journal:
            assert journal.done == 1
            journal.finish()


def test_a_file_that_is_no_journal_is_left_alone(tmp_path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line("only"))
    with BatchInput(source) as batch:
        for foreign in (b"my notes, without an end", b"x" * 10_000, b"\xff", b"{}\n", b"[" * 5000 + b"\n", b"\n"):
            journal_path(out).write_bytes(foreign)
            with pytest.raises(DataError, match="belongs to another input"):
                Journal(out, batch)
            assert journal_path(out).read_bytes() == foreign
        for torn in (b"", b"\0" * 100, b'{"journal":1,\0\0\0'):
            journal_path(out).write_bytes(torn)
            with Journal(out, batch) as journal:
                assert journal.cut_bytes == len(torn)
        good = journal_path(out).read_bytes()
        for damaged in (b'{"index":true,"output":{}}\n', b'{"index":1e400,"output":{}}\n', b"[" * 5000 + b"\n", b"\n"):
            journal_path(out).write_bytes(good + damaged)
            with pytest.raises(DataError, match="line 2 is damaged"):
                Journal(out, batch)

"""Input that is not JSON although Python's parser accepts it."""

import json

import pytest

from moecluster.strict_json import MAX_DEPTH, JsonProblem, parse_json


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"a": NaN}', "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b"-1e400", "too large"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', '"c" appears twice'),
        (b'{"a\\u0000": 1, "a\\u0000": 1}', "appears twice"),
        (b'{"\\u00e4": 1, "\xc3\xa4": 2}', "appears twice"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        ('{"a": "ü"}'.encode("latin-1"), "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'{"a": [{"b": "cut off \\ud83d"}]}', "a[0].b: a text with half a surrogate pair"),
        (b'{"a": "\\uDE00\\uD83D"}', "half a surrogate pair"),
        (b'{"\\ud800": 1}', "half a surrogate pair"),
        (b"[" * 100_000, "levels"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "levels"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "levels"),
        (b"1" * 6000, "digits"),
        (b"\x00", "no JSON"),
        (b'"a\x00"', "no JSON"),
        (b"", "no JSON"),
        (b'{"a": 1} {}', "no JSON"),
    ],
)
def test_it_is_refused_in_one_line(content: bytes, part: str) -> None:
    with pytest.raises(JsonProblem) as problem:
        parse_json(content)
    output = str(problem.value)
    assert part in output and output.isascii() and "\n" not in output and len(output) < 200


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": [1, 2.5, -0.0, 1e300, null, true, "\\ud83d\\ude00", "\\\\ud83d", "\\u0000"], "b": {"a": 1}}',
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b"[" + b"[]," * 1000 + b"{}]",
        b"1" * 4000,
    ],
)
def test_everything_else_is_what_python_makes_of_it(content: bytes) -> None:
    assert parse_json(content) == parse_json(b"\xef\xbb\xbf" + content) == json.loads(content)

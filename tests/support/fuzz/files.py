"""Targets: settings, a checkpoint's headers, index and metadata, and HTTP bodies, as their readers take them."""

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save as save_tensors

from moecluster.config.load import load_config, override, parse_override, read_config
from moecluster.errors import MoeClusterError
from moecluster.gateway.api_errors import ApiError
from moecluster.gateway.parse_request import parse_chat, parse_completion
from moecluster.gateway.schemas.known_fields import without_unknown
from moecluster.gateway.schemas.requests import ChatCompletionRequest, CompletionRequest
from moecluster.models.checkpoint.files import FolderFiles
from moecluster.models.checkpoint.headers import INDEX_NAME, SINGLE_FILE_NAME, read_headers
from moecluster.strict_json import JsonProblem, parse_json
from tests.support.fuzz.bytes_as_choices import Choices
from tests.support.fuzz.run import Target

TOKENS = (
    b"[", b"]", b"{", b"}", b"[[", b"]]", b'"', b"'", b'"""', b",", b":", b"=", b".", b"\n", b"#", b"\\", b"\\u0000",
    b"\\ud800", b"\\udc00", b"0", b"1", b"-1", b"1.5", b"1e999", b"9" * 5000, b"1" + b"0" * 400, b"nan", b"-inf",
    b"NaN", b"Infinity", b"true", b"false", b"null", b"[" * 3000, b'{"a":' * 3000, b"a." * 3000, b"\xef\xbb\xbf",
    b"\xff", b"\0", b"1979-05-27T07:32:00Z", b"x" * 300, b"\nseed = ", b"\nlr = ", b"\neps = [", b"0x" + b"f" * 5000,
)  # fmt: skip
SETTINGS = (
    b"[cluster]\nname = 'a'\nnum_expert_actors = 2\n[model]\nnum_experts = 8\n[train]\nbetas = [0.9, 0.95]\n",
    b"cluster.num_routers=2",
    b"[model.gate]\nkind = 'switch'\n[experts]\nthreads = 1\n",
    b"train.lr = 1e-3\n[serve]\nport = 0\n",
)
BODIES = (
    b'{"model": "m", "prompt": "x", "max_tokens": 4, "stop": ["a"], "logit_bias": {"5": 1.5}, "n": 2, "seed": 1}',
    b'{"model": "m", "prompt": [[1, 2], [3]], "stream": true, "stream_options": {"include_usage": true}}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]}',
    b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "logprobs": true}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [], "user": "u", "response_format": {}}',
)
INDEX = b'{"metadata": {"total_size": 1}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'


@contextmanager
def files(folder: Path) -> Iterator[Mapping[str, Target]]:
    """Context: the targets by name. folder: where they write what is then read."""
    yield {
        "settings": partial(_settings, folder),
        "override": _override,
        "safetensors header": partial(_header, folder),
        "checkpoint index": partial(_index, folder),
        "strict JSON": _strict_json,
        "HTTP body": _body,
    }


def spliced(choices: Choices, *good: bytes) -> bytes:
    """Returns one of the good texts, or none, with parts taken out, tokens put in, and bytes replaced."""
    text = bytearray(choices.one_of((b"", *good)))
    for _ in range(1 + choices.number(8)):
        at = choices.number(len(text) + 1)
        new = choices.one_of(TOKENS) if choices.number(3) else choices.take(choices.number(4))
        text[at : at + choices.one_of((0, 0, 1, 4, 20))] = new
    return bytes(text)


def _settings(folder: Path, data: bytes) -> None:
    file = folder / "settings.toml"
    file.write_bytes(spliced(Choices(data), *SETTINGS))
    load_config(str(file))


def _override(data: bytes) -> None:
    text = spliced(Choices(data), *SETTINGS[1:2], b"train.lr=1", b"model.gate={}", b"train.betas=[1]").decode(
        errors="replace"
    )
    read_config(override({}, dict([parse_override(text)])))


def _header(folder: Path, data: bytes) -> None:
    choices = Choices(data)
    good = save_tensors({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int32)}, {"format": "pt"})
    (size,) = struct.unpack("<Q", good[:8])
    header, values = good[8 : 8 + size], good[8 + size :]
    how = choices.number(4)
    if how == 0:
        content = spliced(choices, good)
    elif how == 1:
        content = choices.rest()
    else:  # its size is right, so that what is in it is read
        header = _changed_header(json.loads(header), choices) if how == 2 else spliced(choices, header)
        content = struct.pack("<Q", len(header)) + header + values
    _write_alone(folder, SINGLE_FILE_NAME, content)
    for info in read_headers(FolderFiles(folder)).values():
        assert 0 <= info.begin <= info.begin + info.num_bytes <= len(content) and min(info.shape, default=0) >= 0, info


def _changed_header(header: dict[str, object], choices: Choices) -> bytes:
    """Returns the header with some of its values replaced by odd ones."""
    odd: tuple[object, ...] = (
        0,
        -1,
        1,
        24,
        2**63,
        10**400,
        1.5,
        1e308,
        float("inf"),
        float("nan"),
        "24",
        "",
        None,
        True,
        [],
        {},
        [0, 24],
        "F32",
    )
    for key in ("a", "b", "__metadata__"):
        entry = header[key]
        assert isinstance(entry, dict)
        for name in list(entry):
            action = choices.number(4)
            if action == 0:
                entry[name] = choices.one_of(odd)
            elif action == 1 and isinstance(entry[name], list):
                entry[name][choices.number(len(entry[name]))] = choices.one_of(odd)
        if not choices.number(12):
            header[key] = choices.one_of(odd)
    return json.dumps(header).encode()


def _index(folder: Path, data: bytes) -> None:
    _write_alone(folder, INDEX_NAME, spliced(Choices(data), INDEX))
    read_headers(FolderFiles(folder))


def _write_alone(folder: Path, name: str, content: bytes) -> None:
    for other in (SINGLE_FILE_NAME, INDEX_NAME):
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


def _strict_json(data: bytes) -> None:
    content = spliced(Choices(data), *BODIES)
    try:
        value = parse_json(content)
    except JsonProblem as exc:
        assert str(exc).isascii() and "\n" not in str(exc), exc
        return
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # what is accepted can be written again


COMPLETION, CHAT = TypeAdapter(CompletionRequest), TypeAdapter(ChatCompletionRequest)


def _body(data: bytes) -> None:
    """As the gateway does: strict JSON, unknown fields dropped or not, the schema, the requests to routers."""
    choices = Choices(data)
    tolerant, chat = choices.number(2), choices.number(2)
    try:
        value = parse_json(spliced(choices, *BODIES))
        if tolerant:
            value = without_unknown(ChatCompletionRequest if chat else CompletionRequest, value)
        job = parse_chat(CHAT.validate_python(value)) if chat else parse_completion(COMPLETION.validate_python(value))
    except (JsonProblem, ValidationError, ApiError, MoeClusterError) as exc:
        str(exc)
        return
    assert job.requests and all(request.request_id for request in job.requests)

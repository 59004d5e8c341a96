"""Streamed text, joined, equals decoding all ids at once, for every kind of tokenizer and any ids."""

from functools import cache
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from moecluster.models.tokenizer.decoding import Detokenizer
from moecluster.models.tokenizer.detokenizer import StreamingDecoder
from moecluster.models.tokenizer.token_bytes import TokenBytes
from tests.support.models.tokenizers_of_all_kinds import KINDS

LONG = 90  # tokens: several windows


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    return KINDS[kind]()


@cache
def detokenizer_of(kind: str) -> Detokenizer:
    return Detokenizer(tokenizer_of(kind))


def id_lists(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, some beyond the vocabulary; a few ids, often repeated; and whole characters as bytes."""
    tokenizer: Any = tokenizer_of(kind)
    size = len(tokenizer)
    anything = st.integers(0, size + 3)
    few = st.lists(anything, min_size=1, max_size=4).flatmap(
        lambda ids: st.lists(st.sampled_from(ids), min_size=20, max_size=LONG)
    )
    lists = st.lists(anything, max_size=LONG) | few
    if tokenizer.convert_tokens_to_ids("<0xE3>") in range(3, size):

        def byte(b: int) -> int:
            return int(tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>"))

        text: st.SearchStrategy[list[int]] = st.text(alphabet="aéあ👍\ufffd ", max_size=12).map(
            lambda t: [byte(b) for b in t.encode()]
        )
        lists |= st.lists(text | st.lists(anything, max_size=2), max_size=8).map(
            lambda parts: list(chain.from_iterable(parts))
        )
    return lists


def chunks_of(kind: str, ids: list[int]) -> list[str]:
    decoder = StreamingDecoder(detokenizer_of(kind))
    return [*(decoder.push(i) for i in ids), decoder.finish()]


def whole_of(kind: str, ids: list[int]) -> str:
    tokenizer: Any = tokenizer_of(kind)
    known = [i for i in ids if i < len(tokenizer)]  # a Python decoder fails on others
    return str(tokenizer.decode(known, skip_special_tokens=True))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole(kind: str, data: st.DataObject) -> None:
    ids = data.draw(id_lists(kind))
    assert "".join(chunks_of(kind, ids)) == whole_of(kind, ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_text_may_end_at_any_token(kind: str, data: st.DataObject) -> None:
    ids = data.draw(id_lists(kind))[:30]
    decoder = StreamingDecoder(detokenizer_of(kind))
    shown = ""
    for count, token in enumerate(ids, 1):
        shown += decoder.push(token)
        assert shown + decoder.finish() == whole_of(kind, ids[:count])


def test_characters_of_byte_fallback_that_follow_each_other() -> None:
    kind = "byte-fallback as Llama's"
    tokenizer: Any = tokenizer_of(kind)
    word = tokenizer.convert_tokens_to_ids("▁hello")
    special = tokenizer.convert_tokens_to_ids("<sep>")
    bytes_of = {text: [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in text.encode()] for text in ("あ", "👍")}
    ids = [*bytes_of["あ"] * 3, *bytes_of["👍"], word]
    assert chunks_of(kind, ids) == [*[""] * 13, "あああ👍 hello", ""]
    first, *rest = bytes_of["あ"]
    assert "".join(chunks_of(kind, [first, special, *rest, word])) == "あ hello"
    assert "".join(chunks_of(kind, [*bytes_of["あ"], first, word])) == "\ufffd" * 4 + " hello"


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_however_long_the_text_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in decoded ids, not in time."""
    detokenizer = detokenizer_of(kind)
    decoded = 0
    decode = detokenizer.decode

    def counting(ids: Any) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(detokenizer, "decode", counting)
    tokenizer: Any = tokenizer_of(kind)
    ids = [i for i in range(len(tokenizer)) if detokenizer.shown_token(i) is not None] * 40
    decoder = StreamingDecoder(detokenizer)
    for token in ids:
        decoder.push(token)
    assert decoded < 120 * len(ids)


# Not where tokens only mark word ends (the space comes with the next token), nor for bytes that Python drops.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("ends of words", "bytes, in Python")])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bytes_of_the_tokens_are_those_of_the_text(kind: str, data: st.DataObject) -> None:
    tokenizer: Any = tokenizer_of(kind)
    detokenizer = detokenizer_of(kind)
    token_bytes = TokenBytes(tokenizer, detokenizer)
    start = [i for i in tokenizer("a", add_special_tokens=False)["input_ids"] if detokenizer.shown_token(i)]
    ids = [i for i in data.draw(id_lists(kind)) if detokenizer.shown_token(i) is not None]
    whole = whole_of(kind, [*start, *ids])
    if "\ufffd" in whole or "'" in whole:  # half characters, and what is cleaned up across tokens, are no sum of tokens
        return
    joined = b"".join(token_bytes.of(i) for i in ids)
    assert whole_of(kind, start).encode() + joined == whole.encode()

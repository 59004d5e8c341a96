"""One sequence as its reader receives it: stop strings in bytes, EOS tokens of every source, and resuming."""

from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerBase

from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.models.tokenizer.decoding import Detokenizer
from moecluster.models.tokenizer.token_bytes import TokenBytes
from moecluster.router.engine.factory import end_ids
from moecluster.router.engine.sampler import SampledToken
from moecluster.router.engine.sequence import TokenSequence
from tests.support.models.engine_sequences import text_of
from tests.support.models.families import make_model
from tests.support.models.tokenizers_of_all_kinds import KINDS

LLAMA = "byte-fallback as Llama's"


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's ids, in byte-fallback tokens if it is not itself a token."""
    known = tokenizer.get_vocab()
    return [known[text]] if text in known else [known[f"<0x{b:02X}>"] for b in text.encode()]


def write(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], *, ends: frozenset[int] = frozenset(), **fields: Any
) -> list[GenerationChunk]:
    """The chunks of a sequence whose model chooses these ids, until it ends."""
    detokenizer = Detokenizer(tokenizer)
    text = TokenSequence(
        GenerationRequest(**{"request_id": "r", "prompt_ids": (5,), **fields}),
        [5],
        max_new_tokens=len(ids),
        end_ids=ends,
        detokenizer=detokenizer,
        token_bytes=TokenBytes(tokenizer, detokenizer),
    )
    for token in ids[len(fields.get("generated_ids", ())) :]:
        if text.is_complete or text.push(SampledToken(id=token)):
            break
    text.end()
    return list(text.stream(lambda: True))


def test_a_stop_string_made_of_bytes_ends_the_request_with_its_last_byte() -> None:
    tokenizer = KINDS[LLAMA]()
    ids = [i for text in ("あ", "い", "う", "え") for i in ids_of(tokenizer, text)]
    chunks = write(tokenizer, ids, stop=("う",))
    assert (text_of(chunks), chunks[-1].finish_reason) == ("あい", "stop")
    assert sum(len(chunk.ids) for chunk in chunks) == 9


def test_a_stop_string_across_bytes_and_words_is_found() -> None:
    tokenizer = KINDS[LLAMA]()
    ids = [*ids_of(tokenizer, "あ"), *ids_of(tokenizer, "▁hello"), *ids_of(tokenizer, "い")]
    chunks = write(tokenizer, ids, stop=("ello",))
    assert (text_of(chunks), chunks[-1].finish_reason) == ("あ h", "stop")


def test_half_a_character_at_the_end_is_a_mark_and_may_be_a_stop_string() -> None:
    tokenizer = KINDS[LLAMA]()
    ids = ids_of(tokenizer, "あ")[:2]
    assert text_of(write(tokenizer, ids)) == "\ufffd\ufffd"
    chunks = write(tokenizer, ids, stop=("\ufffd",))
    assert (text_of(chunks), chunks[-1].finish_reason) == ("", "stop")


@pytest.mark.parametrize("received", range(1, 14))
def test_characters_made_of_bytes_stay_whole_when_a_request_goes_on_elsewhere(received: int) -> None:
    tokenizer = KINDS[LLAMA]()
    ids = [i for text in ("▁hello", "あ", "👍", "▁world", "い", "▁a") for i in ids_of(tokenizer, text)]
    first = write(tokenizer, ids)
    rest = write(tokenizer, ids, generated_ids=tuple(ids[:received]))
    assert text_of(first[:received]) + text_of(rest) == text_of(first) == "helloあ👍 worldい a"


@pytest.mark.parametrize("kind", [LLAMA, "byte-level", "word pieces"])
def test_a_plain_token_that_ends_requests_is_not_shown(kind: str) -> None:
    tokenizer: Any = KINDS[kind]()
    end = tokenizer.convert_tokens_to_ids("<|plain|>")
    a = tokenizer.convert_tokens_to_ids("a")
    chunks = write(tokenizer, [a, end, a], ends=frozenset([end]))
    assert (text_of(chunks), chunks[-1].finish_reason) == ("a", "stop")
    assert sum(len(chunk.ids) for chunk in chunks) == 2
    shown = write(tokenizer, [a, end], ends=frozenset([end]), ignore_eos=True)
    assert text_of(shown) == tokenizer.decode([a, end])


@pytest.mark.parametrize(
    ("generation", "config", "tokenizers", "expected"),
    [
        (7, 8, "<sep>", {7, 8, "<sep>"}),
        ([7, 9], 8, "</s>", {7, 8, 9, "</s>"}),
        (None, [8, 9], None, {8, 9}),
        (7, 2, None, {7}),  # 2 is the default of the family's class if config.json has none
        (None, 2, None, {2}),
    ],
)
def test_ends_are_those_of_all_files(generation: Any, config: Any, tokenizers: str | None, expected: set[Any]) -> None:
    tokenizer: Any = KINDS["byte-level"]()
    tokenizer.eos_token = tokenizers
    model = make_model("mixtral")
    model.config.eos_token_id = config
    model.generation_config = GenerationConfig(eos_token_id=generation)
    ids = {tokenizer.convert_tokens_to_ids(e) if isinstance(e, str) else e for e in expected}
    assert end_ids(model, tokenizer) == ids

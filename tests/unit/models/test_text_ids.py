"""The byte tokenizer and the streaming decoder."""

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moecluster.models.tokenizer.byte_level import BEGIN_ID, END_ID, PAD_ID, VOCAB_SIZE, build_byte_tokenizer
from moecluster.models.tokenizer.decoding import Detokenizer
from moecluster.models.tokenizer.detokenizer import StreamingDecoder

TOKENIZER = build_byte_tokenizer()


def test_marks():
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (BEGIN_ID, END_ID, PAD_ID)
    assert len(TOKENIZER) == VOCAB_SIZE
    assert TOKENIZER.decode([BEGIN_ID, 104, 105, END_ID], skip_special_tokens=True) == "hi"


@given(st.text())
def test_ids_are_bytes_and_come_back(text):
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_marks_spelled_out_in_a_text_are_text():
    assert TOKENIZER.encode("<|end|>") == list(b"<|end|>")


def test_loads_from_a_directory_without_our_code(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "don't <|pad|> , . \r\n\t naïve 漢字 😀"
    assert loaded.encode(text) == list(text.encode()) and loaded.decode(loaded.encode(text)) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (BEGIN_ID, END_ID, PAD_ID)


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40) | st.text().map(lambda t: list(t.encode())))
@settings(max_examples=300)
def test_streamed_pieces_join_to_the_whole(ids):
    """Also if the bytes are not valid UTF-8."""
    decoder = StreamingDecoder(Detokenizer(TOKENIZER))
    pieces = [decoder.push(i) for i in ids]
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert "".join([*pieces, decoder.finish()]) == whole


def test_half_a_character_is_never_shown():
    decoder = StreamingDecoder(Detokenizer(TOKENIZER))
    assert [decoder.push(byte) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    assert decoder.finish() == ""

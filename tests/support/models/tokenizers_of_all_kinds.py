"""Tiny tokenizers of every kind found in checkpoints: each turns tokens into text in its own way."""

from collections.abc import Callable, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

WORDS = ("a", "b", "x", "hello", "world", ".", "?", "!", ",", "'", "n", "t", "s", "m", "ve", "re", "n't", "do", "not")
SPACE = "▁"


def _fast(tokenizer: Tokenizer, **settings: object) -> PreTrainedTokenizerBase:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **settings)
    fast.add_special_tokens({"additional_special_tokens": ["<sep>"]})
    fast.add_tokens([AddedToken("<|plain|>", special=False, normalized=False)])
    return fast


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def _byte_level() -> PreTrainedTokenizerBase:
    letters = [c for _, c in sorted(bytes_to_unicode().items())]
    merged = ["Ġhello", "ĠĠ", "ãģ", "ãģĤ", "ðŁ"]
    tokenizer = Tokenizer(models.BPE(vocab=_numbered(letters + merged), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def _fallback(decoder: decoders.Decoder) -> PreTrainedTokenizerBase:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += [SPACE, SPACE * 2, SPACE * 3, "é", "漢", *WORDS, *(SPACE + word for word in WORDS)]
    tokenizer = Tokenizer(
        models.BPE(vocab=_numbered(tokens), merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoder
    return _fast(tokenizer, unk_token="<unk>")


def _as_llama() -> PreTrainedTokenizerBase:
    return _fallback(
        decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    )


def _as_gemma() -> PreTrainedTokenizerBase:
    return _fallback(decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]))


def _stripped_of_more() -> PreTrainedTokenizerBase:
    return _fallback(
        decoders.Sequence(
            [decoders.Replace(Regex(SPACE), " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 4, 0)]
        )
    )


def _metaspace(scheme: str) -> PreTrainedTokenizerBase:
    tokens = ["<unk>", SPACE, SPACE * 2, "é", *WORDS, *(SPACE + word for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in dict.fromkeys(tokens)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _fast(tokenizer, unk_token="<unk>")


def _word_pieces(*, cleanup: bool, clean_up_spaces: bool) -> PreTrainedTokenizerBase:
    tokens = ["[UNK]", "é", *WORDS, *("##" + word for word in WORDS)]
    tokenizer = Tokenizer(models.WordPiece(vocab=_numbered(tokens), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=cleanup)
    return _fast(tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=clean_up_spaces)


def _ends_of_words() -> PreTrainedTokenizerBase:
    tokens = [*WORDS, *(word + "</w>" for word in WORDS)]
    tokenizer = Tokenizer(models.BPE(vocab=_numbered(tokens), merges=[], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _fast(tokenizer)


def _without_decoder() -> PreTrainedTokenizerBase:
    return _fast(Tokenizer(models.WordLevel(vocab=_numbered(["[UNK]", *WORDS]), unk_token="[UNK]")))


KINDS: Mapping[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": _byte_level,
    "byte-fallback as Llama's": _as_llama,
    "byte-fallback as Gemma's": _as_gemma,
    "byte-fallback, stripped of more spaces": _stripped_of_more,
    "metaspace": lambda: _metaspace("always"),
    "metaspace, first": lambda: _metaspace("first"),
    "metaspace, never": lambda: _metaspace("never"),
    "word pieces": lambda: _word_pieces(cleanup=False, clean_up_spaces=False),
    "word pieces, cleaned": lambda: _word_pieces(cleanup=True, clean_up_spaces=False),
    "word pieces, cleaned twice": lambda: _word_pieces(cleanup=True, clean_up_spaces=True),
    "word pieces, cleaned as a whole": lambda: _word_pieces(cleanup=False, clean_up_spaces=True),
    "ends of words": _ends_of_words,
    "no decoder": _without_decoder,
    "bytes, in Python": ByT5Tokenizer,
}

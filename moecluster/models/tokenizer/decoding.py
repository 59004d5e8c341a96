"""What a tokenizer makes of single ids and of runs of them: the facts that streaming needs, for any tokenizer."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
_CLEANS_BPE_TOO = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CLEANED_CHARACTERS = 7  # a clean-up ("n ' t" to "n't") reaches no farther back, and begins at one of these:
_CLEANED_BEGIN = re.compile("[ ']")


class Detokenizer:
    """Decoding as `tokenizer.decode(ids, skip_special_tokens=True)` does it. Shared by all texts of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if hasattr(backend, "get_added_tokens_decoder") else None
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._has_fallback = True
        self._special: frozenset[int] = frozenset()
        if self._backend is not None:
            # transformers cleans nothing up behind BPE, whose spaces are all meant.
            forced = getattr(tokenizer, _CLEANS_BPE_TOO, False)
            self._cleans &= bool(forced) or type(self._backend.model).__name__ != "BPE"
            self._has_fallback = self._backend.decoder is not None and b'"ByteFallback"' in bytes(
                self._backend.decoder.__getstate__()
            )
            added = self._backend.get_added_tokens_decoder()
            self._special = frozenset(token_id for token_id, token in added.items() if token.special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids alone. Raises ValueError where the tokenizers library panics."""
        try:
            text = self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=self._cleans
            )
        except BaseException as exc:  # a panic of Rust is no Exception: it would end the thread of all texts
            if type(exc).__name__ == "PanicException":
                raise ValueError(f"the tokenizer cannot decode its own tokens: {exc}") from exc
            raise
        assert isinstance(text, str)
        return text

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None for an id that it has not."""
        if self._backend is not None:
            found: str | None = self._backend.id_to_token(token_id)
            return found
        return next(iter(self._tokenizer.convert_ids_to_tokens([token_id])), None)

    def shown_token(self, token_id: int) -> str | None:
        """The token, unless a decoder passes it over: special ones, and ids without a token."""
        if self._backend is not None:
            return None if token_id in self._special else self.token(token_id)
        if token_id >= len(self._tokenizer):  # in Python some make up tokens that they cannot decode
            return None
        return next(iter(self._tokenizer.convert_ids_to_tokens([token_id], skip_special_tokens=True)), None)

    def fallback_byte(self, token: str) -> int | None:
        """The byte that a token of SentencePiece's byte fallback, such as <0xE3>, stands for; None for all others."""
        match = _FALLBACK_BYTE.fullmatch(token) if self._has_fallback else None
        return int(match[1], 16) if match else None

    def uncertain(self, text: str) -> int:
        """How many characters at the end of a text may be others once it goes on."""
        count = 1 if text.endswith(REPLACEMENT) else 0
        if self._cleans:
            tail = text[-_CLEANED_CHARACTERS:]
            begin = _CLEANED_BEGIN.search(tail)
            count = max(count, len(tail) - begin.start() if begin else 0)
        return count

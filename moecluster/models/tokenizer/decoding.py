"""Decodes token ids, and gives the facts about single tokens that streaming needs, for any tokenizer."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # decoders return it for bytes that are invalid or incomplete UTF-8
_CLEANS_BPE_TOO = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CLEANED_CHARACTERS = 7  # a clean-up ("n ' t" to "n't") reaches at most this far back, and begins at one of these:
_CLEANED_BEGIN = re.compile("[ ']")


class Detokenizer:
    """Decodes like `tokenizer.decode(ids, skip_special_tokens=True)`. One instance serves all sequences."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if hasattr(backend, "get_added_tokens_decoder") else None
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._has_fallback = True
        self._special: frozenset[int] = frozenset()
        if self._backend is not None:
            # transformers does no clean-up after BPE, whose spaces are all intended.
            forced = getattr(tokenizer, _CLEANS_BPE_TOO, False)
            self._cleans &= bool(forced) or type(self._backend.model).__name__ != "BPE"
            self._has_fallback = self._backend.decoder is not None and b'"ByteFallback"' in bytes(
                self._backend.decoder.__getstate__()
            )
            added = self._backend.get_added_tokens_decoder()
            self._special = frozenset(token_id for token_id, token in added.items() if token.special)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of these ids alone. Raises ValueError if the tokenizers library panics."""
        try:
            text = self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=self._cleans
            )
        except BaseException as exc:  # a Rust panic is not an Exception, and would end the thread of all sequences
            if type(exc).__name__ == "PanicException":
                raise ValueError(f"the tokenizer cannot decode its own tokens: {exc}") from exc
            raise
        assert isinstance(text, str)
        return text

    def token(self, token_id: int) -> str | None:
        """Returns the token as spelled in the vocabulary; None for an unknown id."""
        if self._backend is not None:
            found: str | None = self._backend.id_to_token(token_id)
            return found
        return next(iter(self._tokenizer.convert_ids_to_tokens([token_id])), None)

    def shown_token(self, token_id: int) -> str | None:
        """Returns the token; None if decoding skips it: a special token, or an id without a token."""
        if self._backend is not None:
            return None if token_id in self._special else self.token(token_id)
        if token_id >= len(self._tokenizer):  # some Python tokenizers invent tokens here that they cannot decode
            return None
        return next(iter(self._tokenizer.convert_ids_to_tokens([token_id], skip_special_tokens=True)), None)

    def fallback_byte(self, token: str) -> int | None:
        """Returns the byte of a SentencePiece byte-fallback token, such as <0xE3>; None for all others."""
        match = _FALLBACK_BYTE.fullmatch(token) if self._has_fallback else None
        return int(match[1], 16) if match else None

    def uncertain(self, text: str) -> int:
        """Returns how many characters at the end of a text may still change when more tokens follow."""
        count = 1 if text.endswith(REPLACEMENT) else 0
        if self._cleans:
            tail = text[-_CLEANED_CHARACTERS:]
            begin = _CLEANED_BEGIN.search(tail)
            count = max(count, len(tail) - begin.start() if begin else 0)
        return count

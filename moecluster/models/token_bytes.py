"""The bytes that a single token stands for, for any fast tokenizer: what log-probabilities are shown with."""

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SENTENCEPIECE_SPACE = "▁"


class TokenBytes:
    """Byte-level tokenizers (GPT-2's alphabet), SentencePiece with byte fallback, and others by what they decode to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self._byte_level = self._is_byte_level()

    def of(self, token_id: int) -> bytes:
        """Empty for an id without a token."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""
        if token_id in self._tokenizer.all_special_ids:
            return token.encode()
        if self._byte_level and all(character in self._bytes for character in token):
            return bytes(self._bytes[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SENTENCEPIECE_SPACE, " ").encode()

    def _is_byte_level(self) -> bool:
        """Whether a space is written as in GPT-2's alphabet."""
        space = bytes_to_unicode()[ord(" ")]
        return any(space in str(t) for t in self._tokenizer.convert_ids_to_tokens(self._ids_of_space()))

    def _ids_of_space(self) -> list[int]:
        ids = self._tokenizer(" a", add_special_tokens=False)["input_ids"]
        return list(ids)

"""Returns the bytes of a single token, for any tokenizer, as reported with log-probabilities."""

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moecluster.models.tokenizer.decoding import REPLACEMENT, Detokenizer


class TokenBytes:
    """Gives the text, as bytes, that a token adds in the middle of a text; for part of a character, its raw bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._byte_level = {character: byte for byte, character in bytes_to_unicode().items()}
        self._before = [i for i in tokenizer("a", add_special_tokens=False)["input_ids"] if detokenizer.shown_token(i)]
        self._before_text = detokenizer.decode(self._before)

    def of(self, token_id: int) -> bytes:
        """Returns the token's bytes; empty for an id without a token. For a special token, which decoding skips, its
        name."""
        token = self._detokenizer.shown_token(token_id)
        if token is None:
            return (self._detokenizer.token(token_id) or "").encode()
        byte = self._detokenizer.fallback_byte(token)
        if byte is not None:
            return bytes([byte])
        text = self._detokenizer.decode([*self._before, token_id])
        if text.startswith(self._before_text) and REPLACEMENT not in text:
            return text[len(self._before_text) :].encode()
        if all(character in self._byte_level for character in token):
            return bytes(self._byte_level[character] for character in token)
        return token.encode()

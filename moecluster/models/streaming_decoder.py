"""Token ids -> text piece by piece, for any tokenizer, never showing half a character."""

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one


class StreamingDecoder:
    """Decodes a growing sequence. The pieces, joined, are what decoding the whole at once gives.

    Bytes at the end that may yet become a character are held back. Only a short window is decoded again at each token:
    the last token already shown stays in it, so that tokenizers which drop a leading space do so only once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0  # characters of the decoded window that were given out

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often empty in the middle of a character."""
        self._window.append(token_id)
        text = self._decode()
        if text.endswith(_REPLACEMENT):
            return self._give(text.rstrip(_REPLACEMENT))
        piece = self._give(text)
        self._window = self._window[-1:]
        self._shown = len(self._decode())
        return piece

    def finish(self) -> str:
        """What was held back, with replacement characters for bytes that never became text."""
        return self._give(self._decode())

    def _give(self, certain: str) -> str:
        piece = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        return piece

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

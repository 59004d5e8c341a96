"""Streaming detokenization for any tokenizer: token ids -> text, never with half a character."""

import codecs
from collections.abc import Iterable
from itertools import takewhile

from moecluster.models.tokenizer.decoding import REPLACEMENT, Detokenizer

WINDOW_TOKENS = 24  # at most this many are decoded again at each token, unless their text is shorter than the anchor
ANCHOR_CHARACTERS = 8  # emitted characters that stay in the window, so that what follows decodes as in the whole text


class StreamingDecoder:
    """Decodes a growing sequence. The chunks, joined, equal the text of decoding all tokens at once.

    It holds back what a later token may change: bytes that are not yet a character; spaces, if the tokenizer cleans
    them up; and a run of byte-fallback tokens until its end, since one invalid byte turns the whole run into
    replacement characters. Only a short window is decoded again at each token. Tokens are dropped from the start of
    the window if the end still decodes to the same text without them.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._window: list[int] = []
        self._text = ""  # of the window
        self._shown = 0  # characters of it that were returned
        self._cut_at = WINDOW_TOKENS
        self._run = _ByteRun()  # after the window

    def push(self, token_id: int) -> str:
        """Returns the text that is final with this token; often empty in the middle of a character."""
        token = self._detokenizer.shown_token(token_id)
        if token is None:
            return ""
        byte = self._detokenizer.fallback_byte(token)
        if byte is not None:
            self._run.push(token_id, byte)
            return ""
        self._window += [*self._run.ids, token_id]
        self._run = _ByteRun()
        self._text = self._detokenizer.decode(self._window)
        certain = len(self._text) - self._detokenizer.uncertain(self._text)
        piece = self._text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if len(self._window) > self._cut_at:
            self._cut()
        return piece

    def pending(self) -> str:
        """Returns about what finish() would return, without half a character at its end. Costs no decoding."""
        return (self._text[self._shown :] + self._run.text).rstrip(REPLACEMENT)

    def finish(self) -> str:
        """Returns the text held back, with replacement characters for incomplete bytes. Does not change the state."""
        text = self._detokenizer.decode([*self._window, *self._run.ids]) if self._run.ids else self._text
        return text[self._shown :]

    def _cut(self) -> None:
        """Halves the window if the rest still decodes to the same text; otherwise tries again later."""
        window = self._window[len(self._window) // 2 :]
        text = self._detokenizer.decode(window)
        not_shown = len(self._text) - self._shown
        same = _same_characters(reversed(self._text), reversed(text))
        if same < ANCHOR_CHARACTERS + not_shown:
            self._cut_at = 2 * len(self._window)
            return
        self._window, self._text, self._shown = window, text, len(text) - not_shown
        self._cut_at = WINDOW_TOKENS


def _same_characters(first: Iterable[str], second: Iterable[str]) -> int:
    """Returns the length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


class _ByteRun:
    """A run of byte-fallback tokens."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text = ""  # its complete characters; empty once a byte was invalid
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._wrong = False

    def push(self, token_id: int, byte: int) -> None:
        self.ids.append(token_id)
        if self._wrong:
            return
        try:
            self.text += self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._wrong, self.text = True, ""

"""Log-probabilities in the two forms that OpenAI has for them."""

import codecs
from collections.abc import Sequence
from typing import Any

from moecluster.generation import TokenLogprob

LOWEST = -9999.0  # stands for minus infinity, which JSON has not


class CompletionLogprobs:
    """Of one text: lists side by side, with the place of each token in the text."""

    def __init__(self, start: int = 0) -> None:
        """start: characters before the first token."""
        self._offset = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def told(self, tokens: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """The next tokens of the text."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.token))
        return {
            "tokens": [_shown(token) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            # The token itself is always among them.
            "top_logprobs": [{_shown(t): _finite(t.logprob) for t in (*token.top, token)} for token in tokens],
            "text_offset": offsets,
        }


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
    """Of some tokens of a text."""
    content = [{**_chat_token(token), "top_logprobs": [_chat_token(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": []}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token.decode("utf-8", "replace"),
        "logprob": _finite(token.logprob),
        "bytes": list(token.token),
    }


def _shown(token: TokenLogprob) -> str:
    """The text of a token; of one that is a part of a character, its bytes, as OpenAI shows it."""
    try:
        return token.token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)

"""Log-probabilities in OpenAI's two formats."""

import codecs
from collections.abc import Sequence
from typing import Any

from moecluster.generation import TokenLogprob

LOWEST = -9999.0  # in place of minus infinity, which JSON lacks


class CompletionLogprobs:
    """Formats one choice of /v1/completions: parallel lists, with the offset of each token in the text."""

    def __init__(self, start: int = 0) -> None:
        """start: characters before the first token."""
        self._offset = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def to_openai(self, tokens: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Formats the next tokens of the choice."""
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
    """Formats tokens of a choice of /v1/chat/completions."""
    content = [{**_chat_token(token), "top_logprobs": [_chat_token(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": []}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token.decode("utf-8", "replace"),
        "logprob": _finite(token.logprob),
        "bytes": list(token.token),
    }


def _shown(token: TokenLogprob) -> str:
    """Returns a token's text, or its bytes if it is only a part of a character, as OpenAI does."""
    try:
        return token.token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)

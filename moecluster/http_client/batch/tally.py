"""Counts the results of a batch, line by line."""

from collections import Counter
from collections.abc import Mapping
from typing import Any


class Tally:
    """Counts of finished lines."""

    def __init__(self) -> None:
        self.answered = 0  # with a status below 400
        self.failed: Counter[str] = Counter()  # by status or error code
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def add(self, output: Mapping[str, Any]) -> None:
        """Counts one output line."""
        response, error = output.get("response"), output.get("error")
        if not isinstance(response, Mapping):
            code = error.get("code") if isinstance(error, Mapping) else None
            self.failed[str(code or "unknown")] += 1
            return
        status = response.get("status_code")
        if not isinstance(status, int) or status >= 400:
            self.failed[f"status {status}"] += 1
            return
        self.answered += 1
        body = response.get("body")
        usage = body.get("usage") if isinstance(body, Mapping) else None
        if isinstance(usage, Mapping):
            self.prompt_tokens += _count(usage.get("prompt_tokens"))
            self.completion_tokens += _count(usage.get("completion_tokens"))

    @property
    def done(self) -> int:
        return self.answered + self.failed.total()


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0

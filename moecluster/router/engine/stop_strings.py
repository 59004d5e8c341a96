"""Finds stop strings in streamed text: no part of one is ever shown, and nothing else is lost."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string. Holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text_part: str) -> tuple[str, bool]:
        """Returns (text that became certain, whether a stop string was found); after one, drops the rest."""
        if not self._stops:
            return text_part, False
        text = self._held + text_part
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def come_with(self, text_part: str) -> bool:
        """Whether this text would complete a stop string."""
        return any(stop in self._held + text_part for stop in self._stops) if text_part else False

    def finish(self) -> str:
        """Returns the held-back text, when the sequence ends for another reason."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Returns how many characters at the end of the text begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)

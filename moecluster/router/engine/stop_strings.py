"""Stop texts in a text that comes piece by piece: nothing of one is ever shown, and nothing else is lost."""

from collections.abc import Sequence


class StopTexts:
    """Passes a text on up to the first stop text. What may yet become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(what became certain, whether a stop text has come); after one, the rest is dropped."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def come_with(self, piece: str) -> bool:
        """Whether a stop text would come if this piece came now."""
        return any(stop in self._held + piece for stop in self._stops) if piece else False

    def finish(self) -> str:
        """What was held back, when the text ends otherwise."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the text's end begin the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)

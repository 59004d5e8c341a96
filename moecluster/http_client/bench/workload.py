"""The requests of a load and their arrival times, drawn from a seed, so that two runs send the same."""

import random
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecluster.errors import ConfigError, DataError

MAX_TOKENS = 2**20


@dataclass(frozen=True, kw_only=True)
class LengthRange:
    """Lengths from lowest to highest, uniformly distributed."""

    lowest: int
    highest: int

    def draw(self, choose: random.Random) -> int:
        return choose.randint(self.lowest, self.highest)


def read_range(text: str, option: str) -> LengthRange:
    """Parses 128, or 64-256. Raises ConfigError, naming the option."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
    lowest, highest = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < lowest <= highest <= MAX_TOKENS:
        raise ConfigError(f'{option}: got "{text}", expected a number of tokens, or a range such as 64-256')
    return LengthRange(lowest=lowest, highest=highest)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request to send."""

    prompt: Sequence[int] | str  # token ids, or text
    output_tokens: int
    seed: int


def asks(
    *, seed: int, input_tokens: LengthRange, output_tokens: LengthRange, vocab_size: int, words: Sequence[str] = ()
) -> Generator[Ask, None, None]:
    """Yields requests endlessly. Prompts are random ids below vocab_size or, given words, consecutive words."""
    choose = random.Random(seed)
    while True:
        length = input_tokens.draw(choose)
        prompt: Sequence[int] | str = [choose.randrange(vocab_size) for _ in range(length)]
        if words:
            first = choose.randrange(max(len(words) - length, 0) + 1)
            prompt = " ".join(words[first : first + length])
        yield Ask(prompt=prompt, output_tokens=output_tokens.draw(choose), seed=choose.getrandbits(32))


def read_words(path: Path) -> list[str]:
    """Returns the words of a text file. Raises DataError."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: cannot be read as a text ({exc})") from exc
    if not words:
        raise DataError(f"{path}: holds no word")
    return words


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Yields arrival times endlessly, in seconds from the start: a Poisson process of this mean rate."""
    choose, at_s = random.Random(seed), 0.0
    while True:
        at_s += choose.expovariate(rate_per_s)
        yield at_s

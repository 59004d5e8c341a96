"""Batches of token ids from text. A run can resume at or roll back to any position, since batches are reproducible.

B sequences of S tokens. Sequence number n of the run is a function of (seed, n) and the text.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moecluster.errors import DataError
from moecluster.training.corpus import Domain

PIECE_CHARACTERS = 2**14  # tokenized at once; tokenizers slow down on long texts


@dataclass(frozen=True, kw_only=True)
class TokenizedDomain:
    """A domain as token ids. Documents are joined by the tokenizer's EOS token, if it has one."""

    name: str
    train: np.ndarray  # [n] int32
    validation: np.ndarray  # [n] int32
    bytes_per_token: float  # of the validation text


class TextData:
    """Training batches and validation windows. Domains take turns, with the same number of tokens each."""

    def __init__(
        self, domains: Sequence[Domain], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int, seed: int
    ) -> None:
        """Raises DataError if a domain is shorter than one sequence."""
        # Cut all domains to the same length, so that averages over domains weight them as training does.
        length = min(sum(len(text.encode()) for text in domain.validation) for domain in domains)
        self._validation_bytes = {d.name: "\n".join(d.validation).encode()[:length] for d in domains}
        self.left_out = tuple(domain.left_out for domain in domains if domain.left_out)
        self.sequence_length = sequence_length
        self._seed = seed
        self.domains = tuple(
            _tokenize(domain, self._validation_bytes[domain.name].decode(errors="ignore"), tokenizer)
            for domain in domains
        )
        for domain in self.domains:
            for part, ids in (("training", domain.train), ("validation", domain.validation)):
                if len(ids) < sequence_length:
                    raise DataError(
                        f"{domain.name} has {len(ids)} tokens of {part} text: at least one sequence of "
                        f"train.sequence_length = {sequence_length} is needed"
                    )

    def train_batch(self, position: int, batch_size: int) -> torch.Tensor:
        """Returns int64 [B, S]: the run's sequences from number `position` to `position + B - 1`."""
        return torch.stack([self._train_sequence(position + i) for i in range(batch_size)])

    def validation_windows(self, count: int, domain: str | None = None) -> torch.Tensor:
        """Returns int64 [W, S], W <= count: evenly spaced windows of the validation text of one domain or, in turns, of
        all domains."""
        wanted = [d for d in self.domains if domain is None or d.name == domain]
        each = [list(self._windows(d, math.ceil(count / len(wanted)))) for d in wanted]
        turns = [window for turn in zip(*each, strict=False) for window in turn]
        return torch.stack(turns[:count])

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token of the validation text, mean over domains. Bits per token divided by it are bits per byte."""
        return sum(d.bytes_per_token for d in self.domains) / len(self.domains)

    @property
    def unigram_bits_per_byte(self) -> float:
        """Entropy of single bytes of the validation text: the loss of a model that knows only byte frequencies."""
        counts = Counter[int]()
        for content in self._validation_bytes.values():
            counts.update(content)
        total = counts.total()
        return -sum(n / total * math.log2(n / total) for n in counts.values())

    def _train_sequence(self, number: int) -> torch.Tensor:
        ids = self.domains[number % len(self.domains)].train
        random = np.random.default_rng(np.random.SeedSequence((self._seed, number)))
        begin = int(random.integers(len(ids) - self.sequence_length + 1))
        return torch.from_numpy(ids[begin : begin + self.sequence_length].astype(np.int64))

    def _windows(self, domain: TokenizedDomain, count: int) -> Iterator[torch.Tensor]:
        count = min(count, len(domain.validation) // self.sequence_length)
        room = len(domain.validation) - self.sequence_length
        for i in range(count):
            begin = room * i // max(count - 1, 1)
            yield torch.from_numpy(domain.validation[begin : begin + self.sequence_length].astype(np.int64))


def _tokenize(domain: Domain, validation: str, tokenizer: PreTrainedTokenizerBase) -> TokenizedDomain:
    validation_ids = _encode((validation,), tokenizer)
    return TokenizedDomain(
        name=domain.name,
        train=_encode(domain.train, tokenizer),
        validation=validation_ids,
        bytes_per_token=len(validation.encode()) / max(len(validation_ids), 1),
    )


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Returns the int32 ids of the texts, joined by the tokenizer's EOS token, if it has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[list[int]] = []
    for text in texts:
        pieces = [text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS)]
        parts += tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(end)
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts[:-1]])

"""The batches over transformers' paged cache, as their caller sees them."""

from collections.abc import Collection, Sequence

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus

from moecluster.errors import Unavailable
from moecluster.hf.continuous_batching import BatchRows, PagedBatches, PagedLimits

CLOSE_TIMEOUT_S = 60.0


class FailureHooks:
    """Hooks that keep the names of failed sequences."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def begin_batch(self, rows: Sequence[BatchRows]) -> None:
        """Does nothing."""

    def choose(self, names: Sequence[str], logits_BV: torch.Tensor) -> Sequence[tuple[int, bool]]:
        return [(0, False) for _ in names]

    def spoilt(self) -> Collection[str]:
        return ()

    def failed(self, name: str, error: Exception, computed: Sequence[str]) -> None:
        self.failures.append(name)


def test_a_sequence_that_comes_as_the_thread_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends between the manager's acceptance of a sequence and its arrival in the manager's queue."""
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_local_experts=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    hooks = FailureHooks()
    limits = PagedLimits(max_cached_tokens=128, max_batch_tokens=8, max_sequences=1)
    batches = PagedBatches(MixtralForCausalLM(config).eval(), limits, hooks)
    accept, has_ended = BackgroundThreadStatus.can_accept_new_requests, False

    def end_after(status: BackgroundThreadStatus) -> str | None:
        nonlocal has_ended
        reason = accept(status)
        if not has_ended:
            has_ended = True
            batches.close(CLOSE_TIMEOUT_S)
        return reason

    monkeypatch.setattr(BackgroundThreadStatus, "can_accept_new_requests", end_after)
    with pytest.raises(Unavailable, match="the batches have ended"):
        batches.add("late", [1, 2, 3])
    assert has_ended and hooks.failures == []

"""Unusual experts are served: without parameters, or with results that depend on the number of rows."""

from pathlib import Path

import pytest
import torch
from torch import nn

from moecluster.models.experts.source import ExpertSource
from moecluster.types import ExpertId
from tests.support.expert.batches import make_batch
from tests.support.expert.small_actor import (
    LAYER,
    WIDTH,
    ask,
    serving,
)


class Uneven(nn.Module):
    """An expert whose results depend on the number of rows beyond 100."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x_nD: torch.Tensor) -> torch.Tensor:
        return x_nD * self.weight + (1.0 if len(x_nD) > 100 else 0.0)


def give(monkeypatch: pytest.MonkeyPatch, made: dict[int, nn.Module]) -> None:
    """Makes checkpoints return these modules for some experts."""
    really_load = ExpertSource.load

    def load(self: ExpertSource, expert: ExpertId, dtype: torch.dtype = torch.float32) -> nn.Module:
        return made[expert.index] if expert.index in made else really_load(self, expert, dtype)

    monkeypatch.setattr(ExpertSource, "load", load)


def test_block_sizes_hold_for_every_form_of_expert(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, {1: Uneven()})
    with serving(checkpoint, batch_invariant=True) as service:
        batch = make_batch({1: list(range(600))}, rows=600, width=WIDTH, layer=LAYER, unsummed=True)
        y_PD = ask(service, batch).y_PD
        assert y_PD is not None and torch.equal(y_PD, batch.x_ND)
        check = make_batch({0: list(range(600))}, rows=600, width=WIDTH, layer=LAYER, unsummed=True)
        assert ask(service, check).y_PD is not None


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_experts_without_parameters_are_served(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, batch_invariant: bool
) -> None:
    give(monkeypatch, {0: nn.Identity(), 2: nn.Identity()})
    with serving(checkpoint, batch_invariant=batch_invariant) as service:
        batch = make_batch({0: [0, 1]}, rows=2, width=WIDTH, layer=LAYER)
        y_ND = ask(service, batch).y_ND
        assert y_ND is not None
        torch.testing.assert_close(y_ND, batch.x_ND * batch.pair_weights_P[:, None])

"""Small batches as a router sends them, and a comparison of records."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from moecluster.types import ComputeBatch, MicroBatchTag, Phase, StepTag

STEP = StepTag(term=1, step=1, attempt=0)


def make_batch(
    experts: Mapping[int, Sequence[int]],
    *,
    rows: int,
    width: int,
    phase: Phase = Phase.FORWARD,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layer: int = 0,
    deadline_s: float = 20.0,
    train: MicroBatchTag | None = None,
    **given: Any,
) -> ComputeBatch:
    """Returns a batch of random rows and gate weights. experts: index -> its rows."""
    generator = torch.Generator().manual_seed(seed)

    def random_rows() -> torch.Tensor:
        return torch.randn(rows, width, generator=generator).to(dtype)

    pairs = [row for _, chosen in sorted(experts.items()) for row in chosen]
    if phase is not Phase.FORWARD and train is None:
        train = MicroBatchTag(step=STEP)
    return ComputeBatch(
        **{
            "request_id": 0,
            "layer": layer,
            "phase": phase,
            "x_ND": random_rows(),
            "experts": tuple(sorted(experts)),
            "pair_counts": tuple(len(chosen) for _, chosen in sorted(experts.items())),
            "pair_rows_P": torch.tensor(pairs, dtype=torch.int32),
            "pair_weights_P": torch.rand(len(pairs), generator=generator) + 0.1,
            "deadline_s": deadline_s,
            "train": train,
            "grad_ND": random_rows() if phase is Phase.BACKWARD else None,
            **given,
        }
    )


def assert_same_fields(got: Any, expected: Any) -> None:
    """Asserts that two records are equal, tensors bit for bit."""
    assert type(got) is type(expected)
    for record_field in fields(expected):
        ours, theirs = getattr(got, record_field.name), getattr(expected, record_field.name)
        if isinstance(theirs, torch.Tensor):
            assert ours is not None and ours.dtype == theirs.dtype, record_field.name
            assert ours.shape == theirs.shape, record_field.name
            same = torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
            assert same, record_field.name
        else:
            assert ours == theirs, record_field.name

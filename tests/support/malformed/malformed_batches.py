"""Batches, each broken in one of many ways; the same in every run."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.rpc import tensors
from moecluster.rpc.expert import messages
from moecluster.types import MicroBatchTag, Phase
from tests.support.expert.small_actor import TAG, WIDTH, batch_of
from tests.support.fakes.raw_stream import GOOD

GENERATED = 400


Break = Callable[[random.Random, expert_pb2.Batch], object]


def replace_list(numbers: Any, values: Sequence[int]) -> None:
    del numbers[:]
    numbers.extend(values)


def some_tensor(rng: random.Random, batch: expert_pb2.Batch) -> tensor_pb2.Tensor:
    tensors = [batch.x, batch.pair_rows, batch.pair_weights]
    return rng.choice([*tensors, batch.grad] if batch.phase == expert_pb2.BACKWARD else tensors)


def wrong_dtype(rng: random.Random, batch: expert_pb2.Batch) -> None:
    tensor = some_tensor(rng, batch)
    code: Any = rng.choice([code for code in (0, 4, 5, 6, 1000, -1) if code != tensor.dtype])  # the wire carries any
    tensor.dtype = code


def wrong_shape(rng: random.Random, batch: expert_pb2.Batch) -> None:
    tensor = some_tensor(rng, batch)
    sizes = [-1, 0, 1, 2, 7, 2**20 + 1, 2**31, 2**62, -(2**63)]
    shape = [rng.choice(sizes) for _ in range(rng.randrange(5))]
    if math.prod(shape) != math.prod(tensor.shape):
        replace_list(tensor.shape, shape)
    else:
        tensor.shape.append(1)


def wrong_bytes(rng: random.Random, batch: expert_pb2.Batch) -> None:
    tensor = some_tensor(rng, batch)
    content = tensor.inline
    tensor.inline = rng.choice([content[: rng.randrange(len(content))], content + rng.randbytes(rng.randint(1, 40))])


def region_that_nobody_agreed_on(rng: random.Random, batch: expert_pb2.Batch) -> None:
    length_bytes = len(batch.x.inline)
    some_tensor(rng, batch).region.CopyFrom(tensor_pb2.Region(offset=64, length_bytes=length_bytes, sequence=1))


def wrong_rows(rng: random.Random, batch: expert_pb2.Batch) -> None:
    rows = tensors.decode_tensor(batch.pair_rows, "", dtypes=(torch.int32,), shape=(None,)).clone()
    rows[rng.randrange(len(rows))] = rng.choice([-1, -(2**31), 5, 2**31 - 1])
    batch.pair_rows.CopyFrom(tensors.encode_tensor(rows))


def wrong_counts(rng: random.Random, batch: expert_pb2.Batch) -> None:
    counts = list(batch.expert_pairs)
    counts[rng.randrange(len(counts))] += rng.choice([-(2**30), -6, -1, 1, 2**30])
    replace_list(batch.expert_pairs, counts[: rng.choice([1, 2, 2, 2])])


def wrong_experts(rng: random.Random, batch: expert_pb2.Batch) -> None:
    replace_list(batch.experts, rng.choice([[], [2], [2, 0], [0, 0], [-1, 2], [0, 1, 2], [-(2**31), 2**31 - 1]]))


def another_width(rng: random.Random, batch: expert_pb2.Batch) -> None:
    rows = torch.zeros(5, rng.choice([1, WIDTH - 1, WIDTH + 1, 3 * WIDTH]))
    batch.x.CopyFrom(tensors.encode_tensor(rows))
    batch.grad.CopyFrom(tensors.encode_tensor(rows))


def another_float(rng: random.Random, batch: expert_pb2.Batch) -> None:
    rows = torch.zeros(5, WIDTH, dtype=rng.choice([torch.bfloat16, torch.float16]))
    batch.x.CopyFrom(tensors.encode_tensor(rows))
    batch.grad.CopyFrom(tensors.encode_tensor(rows))


def wrong_deadline(rng: random.Random, batch: expert_pb2.Batch) -> None:
    batch.deadline_s = rng.choice([math.nan, math.inf, -math.inf, 0.0, -0.0, -1e-300, -rng.random(), 3600.1, 1e308])


def wrong_phase(rng: random.Random, batch: expert_pb2.Batch) -> None:
    number: Any = rng.choice([0, 4, -1, 2**31 - 1])  # the wire carries any
    batch.phase = number


def wrong_layer(rng: random.Random, batch: expert_pb2.Batch) -> None:
    batch.layer = rng.choice([-1, -(2**31)])


def missing_field(rng: random.Random, batch: expert_pb2.Batch) -> None:
    batch.ClearField(rng.choice(["x", "experts", "expert_pairs", "pair_rows", "pair_weights", "deadline_s", "phase"]))


BREAKS: list[Break] = [
    wrong_dtype,
    wrong_shape,
    wrong_bytes,
    region_that_nobody_agreed_on,
    wrong_rows,
    wrong_counts,
    wrong_experts,
    another_width,
    another_float,
    wrong_deadline,
    wrong_phase,
    wrong_layer,
    missing_field,
]
FIELDS = {field.name for field in expert_pb2.Batch.DESCRIPTOR.fields}


def malformed_batches() -> Iterator[tuple[str, expert_pb2.Batch]]:
    rng = random.Random(0)
    train = MicroBatchTag(step=TAG)
    bases = [
        GOOD,
        *(messages.encode_batch(batch_of(5, phase=p, train=train)) for p in (Phase.TRAIN_FORWARD, Phase.BACKWARD)),
    ]
    for number in range(GENERATED):
        batch = expert_pb2.Batch()
        batch.CopyFrom(rng.choice(bases))
        batch.request_id = number
        what = BREAKS[number % len(BREAKS)]
        what(rng, batch)
        yield f"{number}: {what.__name__}", batch

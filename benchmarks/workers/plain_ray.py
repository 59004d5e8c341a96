"""The layer over plain Ray actors: two actors of one thread and four experts each, one method call per expert.

Rows travel as numpy arrays (bfloat16 as its bits): Ray ships those without a copy, and torch tensors with several.
Large arguments and results pass through Ray's object store, as for any actor call. Forward only.
"""

import itertools
import logging
from functools import lru_cache
from typing import Any

import numpy as np
import ray
import torch
from torch.nn import functional as F

from benchmarks.case import Case, DType
from benchmarks.layer_inputs import NUM_EXPERTS, Batch, make_batches, make_expert
from benchmarks.workers.loop import Call, serve

NUM_ACTORS = 2
EXPERTS_PER_ACTOR = NUM_EXPERTS // NUM_ACTORS
OBJECT_STORE_BYTES = 256 * 2**20
REPLY_TIMEOUT_S = 60.0


def to_numpy(rows: torch.Tensor) -> np.ndarray:
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    rows = torch.from_numpy(array)
    return rows.view(torch.bfloat16) if rows.dtype == torch.int16 else rows


class Experts:
    """Four experts in a process of one thread."""

    def __init__(self, first: int, dtype: DType) -> None:
        torch.set_num_threads(1)
        self.weights = {index: make_expert(index, dtype) for index in range(first, first + EXPERTS_PER_ACTOR)}

    def forward(self, index: int, rows: np.ndarray) -> np.ndarray:
        gate_up, down = self.weights[index]
        with torch.inference_mode():
            gate, up = F.linear(to_torch(rows), gate_up).chunk(2, dim=-1)
            return to_numpy(F.linear(F.silu(gate) * up, down))


@lru_cache(maxsize=2)
def start_actors(dtype: DType) -> list[Any]:
    actor_class: Any = ray.remote(num_cpus=1)(Experts)
    return [actor_class.remote(actor * EXPERTS_PER_ACTOR, dtype) for actor in range(NUM_ACTORS)]


def layer_forward(actors: list[Any], batch: Batch) -> torch.Tensor:
    """Sends every expert its rows, waits for all, and returns the weighted sum y_TD."""
    sent = []
    for index in range(NUM_EXPERTS):
        tokens, choices = torch.where(batch.ids_TK == index)
        if len(tokens):
            actor = actors[index // EXPERTS_PER_ACTOR]
            reply = actor.forward.remote(index, to_numpy(batch.x_TD[tokens]))
            sent.append((tokens, batch.weights_TK[tokens, choices, None], reply))
    y_TD = torch.zeros_like(batch.x_TD)
    outputs = ray.get([reply for _, _, reply in sent], timeout=REPLY_TIMEOUT_S)
    for (tokens, weights, _), output in zip(sent, outputs, strict=True):
        y_TD.index_add_(0, tokens, (to_torch(output) * weights).to(y_TD.dtype))
    return y_TD


def make_call(case: Case) -> Call:
    if case.direction != "forward":
        raise ValueError("plain Ray actors are measured forward only")
    actors = start_actors(case.dtype)
    batches = itertools.cycle(make_batches(case))

    def forward() -> None:
        with torch.inference_mode():
            layer_forward(actors, next(batches))

    return forward


def main() -> None:
    ray.init(
        address="local",
        num_cpus=2 * NUM_ACTORS,  # actors of both dtypes stand; those of one are idle
        include_dashboard=False,
        namespace="benchmark-layer",
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    try:
        serve(make_call)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()

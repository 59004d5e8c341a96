"""The layer in process: transformers' MixtralExperts, with the experts implementation named as first argument.

Threads and their waiting are set from outside, by OMP_NUM_THREADS and OMP_WAIT_POLICY.
"""

import itertools
import sys
from functools import lru_cache, partial

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.case import Case, DType
from benchmarks.layer_inputs import D_INNER, D_MODEL, NUM_EXPERTS, TOP_K, Batch, make_batches, make_expert, torch_dtype
from benchmarks.workers.loop import Call, serve


@lru_cache(maxsize=1)
def make_experts(implementation: str, dtype: DType) -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=D_MODEL, intermediate_size=D_INNER, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = implementation
    experts = MixtralExperts(config).to(torch_dtype(dtype))
    with torch.no_grad():
        for index in range(NUM_EXPERTS):
            experts.gate_up_proj[index], experts.down_proj[index] = make_expert(index, dtype)
    return experts


def make_call(implementation: str, case: Case) -> Call:
    experts = make_experts(implementation, case.dtype)
    batches = itertools.cycle(make_batches(case))

    def forward() -> None:
        batch = next(batches)
        with torch.inference_mode():
            experts(batch.x_TD, batch.ids_TK, batch.weights_TK)

    return forward if case.direction == "forward" else lambda: forward_backward(experts, next(batches))


def forward_backward(experts: MixtralExperts, batch: Batch) -> None:
    """Gradients of the rows, the gate's weights and every parameter, none of them summed onto an earlier call's."""
    experts.zero_grad(set_to_none=True)
    x_TD = batch.x_TD.detach().requires_grad_()
    weights_TK = batch.weights_TK.detach().requires_grad_()
    experts(x_TD, batch.ids_TK, weights_TK).backward(batch.grad_TD)


if __name__ == "__main__":
    serve(partial(make_call, sys.argv[1]))

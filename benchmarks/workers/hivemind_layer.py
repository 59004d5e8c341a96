"""hivemind's mixture layer on this host, run by the Python of hivemind's own environment (`benchmarks/peers.py`).

Eight experts of the very function that the other contenders compute (a SwiGLU expert, registered as hivemind's custom
expert class), on two server processes of four experts and one torch thread each, called through RemoteMixtureOfExperts:
of the settings tried (one server of two threads; 1, 2, 4, 8 handlers a server) the fastest. Forward only; the experts'
dtype is the first argument. hivemind computes its own gate (a linear layer and a beam search over the expert grid)
inside the timed call; the others are given the gate's choice. Its gate cannot run in bfloat16, so rows stay float32 on
its wire and bfloat16 experts cast them.
"""

import itertools
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from hivemind import DHT  # type: ignore[import-not-found]  # stands in its own environment
from hivemind.moe.client import RemoteMixtureOfExperts  # type: ignore[import-not-found]
from hivemind.moe.server import background_server, register_expert_class  # type: ignore[import-not-found]
from torch import nn
from torch.nn import functional as F

from benchmarks.case import Case, DType
from benchmarks.layer_inputs import D_INNER, D_MODEL, NUM_EXPERTS, TOP_K, make_batches, torch_dtype
from benchmarks.workers.loop import Call, serve

NUM_SERVERS = 2
EXPERTS_PER_SERVER = NUM_EXPERTS // NUM_SERVERS
HANDLERS_PER_SERVER = 2
FORWARD_TIMEOUT_S = 60.0
SERVER_STOP_TIMEOUT_S = 20.0


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) in `dtype`, float32 rows [n, hid_dim] to rows of the same shape."""

    def __init__(self, hid_dim: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hid_dim, 2 * D_INNER, bias=False, dtype=dtype)
        self.down = nn.Linear(D_INNER, hid_dim, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x.to(self.gate_up.weight.dtype)).chunk(2, dim=-1)
        y: torch.Tensor = self.down(F.silu(gate) * up)
        return y.to(x.dtype)


def make_call(layer: RemoteMixtureOfExperts, case: Case) -> Call:
    if case.direction != "forward":
        raise ValueError("hivemind's mixture is measured forward only")
    batches = itertools.cycle(make_batches(replace(case, dtype="float32")))

    def forward() -> None:
        with torch.no_grad():
            layer(next(batches).x_TD)

    return forward


def main(dtype: DType) -> None:
    torch.set_num_threads(1)
    expert_class = partial(SwiGLU, dtype=torch_dtype(dtype))
    register_expert_class("swiglu", lambda batch, width: torch.empty(batch, width))(expert_class)
    with ExitStack() as stack:
        peers: list[str] = []
        for server in range(NUM_SERVERS):
            first = server * EXPERTS_PER_SERVER
            info = stack.enter_context(
                background_server(
                    expert_uids=[f"expert.{index}" for index in range(first, first + EXPERTS_PER_SERVER)],
                    expert_cls="swiglu",
                    hidden_dim=D_MODEL,
                    optim_cls=None,
                    num_handlers=HANDLERS_PER_SERVER,
                    device="cpu",
                    initial_peers=peers,
                    shutdown_timeout=SERVER_STOP_TIMEOUT_S,
                )
            )
            peers = [str(address) for address in info.addrs]
        dht = DHT(initial_peers=peers, client_mode=True, start=True)
        stack.callback(dht.shutdown)
        layer = RemoteMixtureOfExperts(
            in_features=D_MODEL,
            grid_size=(NUM_EXPERTS,),
            dht=dht,
            uid_prefix="expert.",
            k_best=TOP_K,
            k_min=1,
            forward_timeout=FORWARD_TIMEOUT_S,
            timeout_after_k_min=FORWARD_TIMEOUT_S,
        )
        serve(partial(make_call, layer))


if __name__ == "__main__":
    main("bfloat16" if sys.argv[1] == "bfloat16" else "float32")

"""The layer through the cluster: two Ray expert actors of one thread and four experts each, reached over gRPC.

Everything is the product's own: experts read from a checkpoint, dispatch, the stream, shared memory or inline rows. The
calling process is the router. The first argument `batch-invariant` turns that mode on.
"""

import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

from benchmarks.case import Case, DType, Transport
from benchmarks.layer_inputs import D_INNER, D_MODEL, NUM_EXPERTS, TOP_K, Batch, make_batches, make_expert
from benchmarks.workers.loop import Call, serve
from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.expert.service import ExpertService
from moecluster.rpc.controller.in_process import FixedPlacement
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.tensors import expect_read_only_views
from moecluster.types import ActorAddress, ExpertId, OptimizerSettings, Placement, Replica, StepTag

NUM_ACTORS = 2
EXPERTS_PER_ACTOR = NUM_EXPERTS // NUM_ACTORS
SHARED_MEMORY_BYTES = 32 * 2**20
START_TIMEOUT_S = 120.0
PACK_TIMEOUT_S = 60.0
ACTOR_ENV = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a pair of actors is started for. Trained experts keep plain weights, served ones packed."""

    checkpoint: str
    dtype: DType
    trained: bool
    invariant: bool


class ExpertActor:
    """A Ray actor with four of the layer's experts."""

    def __init__(self, name: str, experts: tuple[ExpertId, ...], setup: Setup) -> None:
        torch.set_num_threads(1)
        expect_read_only_views()
        self.service = ExpertService(
            is_given=setup.checkpoint.__eq__,
            name=name,
            batch_invariant=setup.invariant,
            activation_budget_bytes=2**30,
        )
        self.service.load(
            LoadRequest(
                term=1,
                experts=experts,
                checkpoint=setup.checkpoint,
                dtype=setup.dtype,
                optimizer=OptimizerSettings() if setup.trained else None,
                training_term=1 if setup.trained else 0,
            )
        )
        assert self.service.wait_packed(PACK_TIMEOUT_S)
        self.server = serve_expert(self.service, credentials=None)

    def address(self) -> ActorAddress:
        return ActorAddress(actor=self.service.name, address=self.server.address, incarnation=self.service.incarnation)


def write_checkpoint(directory: Path) -> None:
    """A Mixtral checkpoint of the one layer's experts, in float32."""
    config = MixtralConfig(
        hidden_size=D_MODEL,
        intermediate_size=D_INNER,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=1,
        vocab_size=32,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(directory)
    weights: dict[str, torch.Tensor] = {}
    for index in range(NUM_EXPERTS):
        gate_up, down = make_expert(index, "float32")
        prefix = f"model.layers.0.block_sparse_moe.experts.{index}"
        gate, up = gate_up.chunk(2)
        weights |= {f"{prefix}.w1.weight": gate.contiguous(), f"{prefix}.w3.weight": up.contiguous()}
        weights[f"{prefix}.w2.weight"] = down
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@lru_cache(maxsize=1)
def start_actors(setup: Setup) -> tuple[Placement, list[Any]]:
    """The actors of a setup: where they are, and their handles, without which they end.

    They ask Ray for no CPU: those of the setup before are let go only when these are there.
    """
    replicas = tuple(
        Replica(expert=ExpertId(layer=0, index=index), actor=f"expert-{index // EXPERTS_PER_ACTOR}")
        for index in range(NUM_EXPERTS)
    )
    actor_class: Any = ray.remote(num_cpus=0, runtime_env={"env_vars": ACTOR_ENV})(ExpertActor)
    handles: list[Any] = []
    for actor in range(NUM_ACTORS):
        name = f"expert-{actor}"
        experts = tuple(replica.expert for replica in replicas if replica.actor == name)
        handles.append(actor_class.remote(name, experts, setup))
    addresses = ray.get([handle.address.remote() for handle in handles], timeout=START_TIMEOUT_S)
    placement = Placement(
        term=1,
        generation=1,
        layer_experts={0: NUM_EXPERTS},
        actors={address.actor: address for address in addresses},
        replicas=replicas,
    )
    return placement, handles


@lru_cache(maxsize=4)
def connect(setup: Setup, transport: Transport) -> RemoteExperts:
    placement, _ = start_actors(setup)

    def open_stream(address: ActorAddress) -> GrpcExpertTransport:
        shared_memory_bytes = SHARED_MEMORY_BYTES if transport == "shm" else 0
        stream = GrpcExpertTransport(address, router="bench", shared_memory_bytes=shared_memory_bytes)
        if stream.name != transport:
            raise RuntimeError(f"the handshake chose {stream.name}, not {transport}")
        return stream

    pool = ExpertPool(
        FixedPlacement(placement),
        connect=open_stream,
        control=lambda address: GrpcExpertControl(address.actor, address.address),
    )
    return RemoteExperts(pool, batch_invariant=setup.invariant)


def make_call(checkpoint: str, invariant: bool, case: Case) -> Call:
    assert case.transport is not None
    trained = case.direction != "forward"
    setup = Setup(checkpoint=checkpoint, dtype=case.dtype, trained=trained, invariant=invariant)
    remote = connect(setup, case.transport)
    batches = itertools.cycle(make_batches(case))

    def forward() -> None:
        batch = next(batches)
        with torch.inference_mode():
            remote(0, batch.x_TD, batch.ids_TK, batch.weights_TK)

    return forward if case.direction == "forward" else lambda: forward_backward(remote, next(batches))


def forward_backward(remote: RemoteExperts, batch: Batch) -> None:
    """Gradients of the rows, the gate's weights and every parameter; a new attempt drops the earlier call's."""
    tag = StepTag(term=1, step=1, attempt=time.monotonic_ns() // 1_000_000)  # grows over all cases on the same actors
    x_TD = batch.x_TD.detach().requires_grad_()
    weights_TK = batch.weights_TK.detach().requires_grad_()
    with remote.training(tag):
        remote(0, x_TD, batch.ids_TK, weights_TK).backward(batch.grad_TD)
    remote.forget(tag)


@contextmanager
def cluster() -> Iterator[str]:
    """A local Ray, and the directory of the layer's checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory))
        ray.init(num_cpus=NUM_ACTORS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield directory
        finally:
            ray.shutdown()


if __name__ == "__main__":
    os.environ.update(ACTOR_ENV)
    torch.set_num_threads(1)
    expect_read_only_views()
    with cluster() as checkpoint:
        serve(partial(make_call, checkpoint, "batch-invariant" in sys.argv[1:]))

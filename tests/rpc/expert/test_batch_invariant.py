"""Batch-invariant mode: a token's output is the same bit for bit, whatever else is in its batches."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.expert.service import ExpertService
from moecluster.models.native.build import register_native_family
from moecluster.models.native.configuration import NativeConfig
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.server import RunningServer
from moecluster.types import ActorAddress, ExpertId, Placement, PlacementNumber, Replica
from tests.support.clusters.expert_cluster import SHARED_MEMORY_BYTES, ExpertCluster, Transport
from tests.support.clusters.given import any_directory
from tests.support.expert.small_actor import TIMEOUT_S, Occupied, queued_rows

WIDTH, INNER, EXPERTS, TOP_K, PROBES = 128, 192, 8, 3, 6  # three: sums of two have only one order
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Shares = Mapping[str, float]

# Expert -> its actors and their shares.
PLACEMENTS: Mapping[str, list[Shares]] = {
    "two actors": [*[{"expert-0": 1.0}] * 4, *[{"expert-1": 1.0}] * 4],
    "three actors, dealt out": [{f"expert-{index % 3}": 1.0} for index in range(EXPERTS)],
    "replicas with odd shares": [
        {"expert-0": 0.37, "expert-1": 0.63},
        {"expert-2": 1.0},
        {"expert-0": 0.05, "expert-1": 0.05, "expert-2": 0.9},
        {"expert-1": 1.0},
        {"expert-0": 1 / 3, "expert-2": 2 / 3},
        {"expert-0": 0.5, "expert-1": 0.5, "expert-2": 0.0},
        {"expert-0": 1.0},
        {"expert-1": 0.999, "expert-2": 0.001},
    ],
}


def replicas_of(shares: list[Shares]) -> tuple[Replica, ...]:
    return tuple(
        Replica(expert=ExpertId(layer=0, index=index), actor=actor, share=share)
        for index, held in enumerate(shares)
        for actor, share in held.items()
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MoE layer, wide enough that the kernel depends on the number of rows."""
    register_native_family()
    config = NativeConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_layers=[0],
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=INNER,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Tokens:
    """Tokens and their routing."""

    def __init__(self, count: int, seed: int, dtype: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x_TD = torch.randn(count, WIDTH, generator=generator).to(DTYPES[dtype])
        self.ids_TK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(count)])
        self.weights_TK = torch.rand(count, TOP_K, generator=generator) + 0.1

    @torch.no_grad()
    def through(self, remote: RemoteExperts) -> torch.Tensor:
        return remote(0, self.x_TD, self.ids_TK, self.weights_TK)

    def chosen(self, order: torch.Tensor) -> "Tokens":
        tokens = Tokens.__new__(Tokens)
        tokens.x_TD, tokens.ids_TK, tokens.weights_TK = self.x_TD[order], self.ids_TK[order], self.weights_TK[order]
        return tokens

    def beside(self, other: "Tokens") -> "Tokens":
        tokens = Tokens.__new__(Tokens)
        tokens.x_TD = torch.cat([self.x_TD, other.x_TD])
        tokens.ids_TK = torch.cat([self.ids_TK, other.ids_TK])
        tokens.weights_TK = torch.cat([self.weights_TK, other.weights_TK])
        return tokens


# Ways to surround the probes with other tokens. Each returns the probes' outputs, in order.
Composition = Callable[[RemoteExperts, Tokens, str], torch.Tensor]


def all_probes_together(remote: RemoteExperts, probes: Tokens, dtype: str) -> torch.Tensor:
    return probes.through(remote)


def each_alone(remote: RemoteExperts, probes: Tokens, dtype: str) -> torch.Tensor:
    return torch.cat([probes.chosen(torch.tensor([t])).through(remote) for t in range(PROBES)])


def in_another_order_and_twice(remote: RemoteExperts, probes: Tokens, dtype: str) -> torch.Tensor:
    order = torch.tensor([3, 0, 5, 3, 1, 4, 2, 0])
    return probes.chosen(order).through(remote)[[1, 4, 6, 3, 5, 2]]


def among_many_others(remote: RemoteExperts, probes: Tokens, dtype: str) -> torch.Tensor:
    everyone = probes.beside(Tokens(700, seed=5, dtype=dtype))
    order = torch.randperm(706, generator=torch.Generator().manual_seed(6))
    return everyone.chosen(order).through(remote)[torch.argsort(order)[:PROBES]]


def while_other_routers_send(remote: RemoteExperts, probes: Tokens, dtype: str) -> torch.Tensor:
    """Actors merge queued batches, so the other rows of a matrix product differ from call to call."""
    done = threading.Event()

    def keep_sending(seed: int) -> None:
        while not done.is_set():
            Tokens(1 + seed * 13, seed=seed, dtype=dtype).through(remote)

    with ThreadPoolExecutor(3) as senders:
        sending = [senders.submit(keep_sending, seed) for seed in range(3)]
        outputs = [probes.through(remote) for _ in range(10)]
        done.set()
    for sender in sending:
        sender.result(TIMEOUT_S)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    return outputs[0]


COMPOSITIONS: tuple[Composition, ...] = (
    all_probes_together,
    each_alone,
    in_another_order_and_twice,
    among_many_others,
    while_other_routers_send,
)


@pytest.fixture(scope="module")
def probes(dtype: str) -> Tokens:
    return Tokens(PROBES, seed=1, dtype=dtype)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, dtype: str, probes: Tokens) -> torch.Tensor:
    """One actor, no wire."""
    with ExpertCluster(checkpoint, num_actors=1, batch_invariant=True, dtype=dtype) as cluster:
        y_TD = probes.through(cluster.remote)
    assert y_TD.dtype == DTYPES[dtype] and y_TD.abs().max() > 0.1
    return y_TD


@pytest.mark.parametrize("transport", ["inline", "shm"])
@pytest.mark.parametrize("shares", PLACEMENTS.values(), ids=PLACEMENTS)
def test_outputs_are_the_same_bits_in_any_company_and_placement(
    checkpoint: Path, dtype: str, probes: Tokens, expected: torch.Tensor, shares: list[Shares], transport: Transport
) -> None:
    with ExpertCluster(
        checkpoint,
        num_actors=len({actor for held in shares for actor in held}),
        replicas=replicas_of(shares),
        transport=transport,
        batch_invariant=True,
        dtype=dtype,
    ) as cluster:
        for composition in COMPOSITIONS:
            assert torch.equal(composition(cluster.remote, probes, dtype), expected), composition.__name__


def test_the_plain_mode_is_close_and_promises_no_more(checkpoint: Path, dtype: str, probes: Tokens, expected) -> None:
    with ExpertCluster(checkpoint, transport="shm", dtype=dtype) as cluster:
        y_TD = among_many_others(cluster.remote, probes, dtype)
    torch.testing.assert_close(y_TD, expected, atol=1e-5 if dtype == "float32" else 0.1, rtol=0.05)


# -- across a kill --


class ChangingPlacement:
    """A PlacementSource whose placement the test replaces."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._placement: Placement | None = None
        self.failed: list[str] = []

    def publish(self, placement: Placement) -> None:
        with self._changed:
            self._placement = placement
            self._changed.notify_all()

    def current(self, timeout_s: float) -> Placement:
        assert self._placement is not None
        return self._placement

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        with self._changed:
            self._changed.wait_for(lambda: self.current(0.0).number > number, timeout_s)
            return self._placement if self.current(0.0).number > number else None

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        with self._changed:
            self.failed.append(actor)
            self._changed.notify_all()

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        raise AssertionError("every expert is sound")

    def wait_for_a_failure(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.failed, TIMEOUT_S)

    def want_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Does nothing: the test sets the placement."""


class Actors:
    """Expert actors over gRPC that come and go."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self.services: dict[str, ExpertService] = {}
        self._servers: dict[str, RunningServer] = {}

    def start(self, name: str) -> None:
        """Starts an actor with all experts; the placement decides which of them are used."""
        service = self.services[name] = ExpertService(is_given=any_directory, name=name, batch_invariant=True)
        experts = tuple(ExpertId(layer=0, index=index) for index in range(EXPERTS))
        service.load(LoadRequest(term=1, experts=experts, checkpoint=str(self._checkpoint), dtype=self._dtype))
        self._servers[name] = serve_expert(service, credentials=None)

    def kill(self, name: str) -> None:
        self._servers.pop(name).stop(0.0)

    def placement(self, generation: int, shares: list[Shares]) -> Placement:
        """A placement over the living actors."""
        return Placement(
            term=1,
            generation=generation,
            layer_experts={0: EXPERTS},
            actors={
                name: ActorAddress(actor=name, address=server.address, incarnation=self.services[name].incarnation)
                for name, server in self._servers.items()
            },
            replicas=replicas_of(shares),
        )

    def close(self) -> None:
        for name in list(self._servers):
            self.kill(name)
        for service in self.services.values():
            service.close()


@contextmanager
def routed(placements: ChangingPlacement, transport: Transport) -> Iterator[RemoteExperts]:
    def connect(address: ActorAddress) -> GrpcExpertTransport:
        size_bytes = SHARED_MEMORY_BYTES if transport == "shm" else 0
        return GrpcExpertTransport(address, router="test", shared_memory_bytes=size_bytes, connect_timeout_s=2.0)

    def control(address: ActorAddress) -> GrpcExpertControl:
        return GrpcExpertControl(address.actor, address.address)

    pool = ExpertPool(placements, connect=connect, control=control)
    remote = RemoteExperts(pool, timeout_s=TIMEOUT_S, batch_invariant=True)
    try:
        yield remote
    finally:
        remote.close()


@pytest.mark.parametrize("transport", ["inline", "shm"])
@pytest.mark.parametrize("moved_to", ["the same name", "everyone elsewhere"])
def test_a_kill_and_retry_in_another_placement_changes_no_bit(
    checkpoint: Path, dtype: str, probes: Tokens, expected: torch.Tensor, transport: Transport, moved_to: str
) -> None:
    """An actor dies with the layer's rows in its queue, after the other one has replied."""
    placements = ChangingPlacement()
    with closing(Actors(checkpoint, dtype)) as actors, routed(placements, transport) as remote:
        actors.start("expert-0")
        actors.start("expert-1")
        placements.publish(actors.placement(1, PLACEMENTS["two actors"]))
        everyone = probes.beside(Tokens(60, seed=8, dtype=dtype))
        undisturbed = everyone.through(remote)
        assert torch.equal(undisturbed[:PROBES], expected)

        with ThreadPoolExecutor(1) as caller:
            with Occupied(actors.services["expert-1"]):
                call = caller.submit(everyone.through, remote)
                while queued_rows(actors.services["expert-1"]) == 0:
                    assert not call.done()
                actors.kill("expert-1")
            placements.wait_for_a_failure()
            assert not call.done()
            if moved_to == "the same name":
                actors.start("expert-1")
                shares: list[Shares] = PLACEMENTS["two actors"]
            else:
                actors.start("expert-2")
                shares = [{"expert-2": 0.7, "expert-0": 0.3}] * EXPERTS
            placements.publish(actors.placement(2, shares))
            assert torch.equal(call.result(TIMEOUT_S), undisturbed)
        assert placements.failed[:1] == ["expert-1"]


@pytest.mark.parametrize("transport", ["inline", "shm"])
def test_a_lost_replica_is_replaced_by_its_twin_without_a_new_placement(
    checkpoint: Path, dtype: str, probes: Tokens, expected: torch.Tensor, transport: Transport
) -> None:
    placements = ChangingPlacement()
    with closing(Actors(checkpoint, dtype)) as actors, routed(placements, transport) as remote:
        actors.start("expert-0")
        actors.start("expert-1")
        placements.publish(actors.placement(1, [{"expert-0": 0.5, "expert-1": 0.5}] * EXPERTS))
        assert torch.equal(probes.through(remote), expected)
        actors.kill("expert-0")
        for _ in range(3):
            assert torch.equal(probes.through(remote), expected)
        assert set(placements.failed) == {"expert-0"}

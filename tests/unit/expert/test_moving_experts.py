"""Loading experts while an actor serves: copies from a peer, and loads concurrent with other requests."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moecluster.errors import DeadlineExceeded, InvalidMessage, StaleRequest, Unavailable
from moecluster.expert.service import ExpertService
from moecluster.expert.weight_sources import BytePace
from moecluster.rpc.expert.in_process import InProcessPeerExports
from moecluster.rpc.expert.interface import ExportedTensor, Pace, PeerExports
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import ActorAddress, ExpertId, OptimizerSettings
from tests.support.clusters.given import any_directory
from tests.support.expert.batches import make_batch
from tests.support.expert.small_actor import (
    EXPERTS,
    LAYER,
    TIMEOUT_S,
    WIDTH,
    ask,
    batch_of,
    computing,
    serving,
    training,
)
from tests.support.waiting import wait_until


class HeldPeer:
    """A peer (and its connection) that sends its first expert at once, and the others when released."""

    def __init__(self, service: ExpertService) -> None:
        self.address = ActorAddress(actor="peer", address="", incarnation=service.incarnation)
        self.go, self.asked, self.closed = threading.Event(), threading.Event(), threading.Event()
        self.copies: Counter[ExpertId] = Counter()
        self.service = service

    def connect(self, address: ActorAddress) -> PeerExports:
        self.closed.clear()
        return self

    def tensors(
        self, expert: ExpertId, *, weight_version: int = 0, max_tensor_bytes: int, timeout_s: float, pace: Pace
    ) -> Iterator[ExportedTensor]:
        self.copies[expert] += 1
        if expert != EXPERTS[0]:
            self.asked.set()
            while not self.go.wait(0.002):
                if self.closed.is_set():
                    raise Unavailable("the connection was closed")
        exports = InProcessPeerExports(self.service, self.address.incarnation)
        yield from exports.tensors(
            expert,
            weight_version=weight_version,
            max_tensor_bytes=max_tensor_bytes,
            timeout_s=timeout_s,
            pace=pace,
        )

    def close(self) -> None:
        self.closed.set()


class Move:
    """An actor without experts, and a peer that holds all and sends them slowly."""

    def __init__(self, checkpoint: Path, stack: ExitStack) -> None:
        self.checkpoint = checkpoint
        self.peer = HeldPeer(stack.enter_context(serving(checkpoint, "peer")))
        self.service = stack.enter_context(
            closing(ExpertService(is_given=any_directory, name="expert-0", connect_peer=self.peer.connect))
        )
        self._threads = ThreadPoolExecutor(8)
        stack.callback(self._threads.shutdown)
        stack.callback(self.peer.go.set)

    def load(self, *, term: int = 1, **changes: Any) -> int:
        request = LoadRequest(term=term, experts=EXPERTS, checkpoint=str(self.checkpoint), peer=self.peer.address)
        return self.service.load(replace(request, **changes))

    def begin_load(self, **changes: Any) -> "Future[int]":
        """Begins a load that blocks in the copy of the second expert."""
        load = self._threads.submit(self.load, **changes)
        assert self.peer.asked.wait(TIMEOUT_S)
        return load

    def begin(self, order: Any, **arguments: Any) -> "Future[Any]":
        return self._threads.submit(order, **arguments)


@pytest.fixture
def move(checkpoint: Path) -> Iterator[Move]:
    with ExitStack() as stack:
        yield Move(checkpoint, stack)


# -- loads concurrent with other requests --


def test_other_orders_and_batches_go_on_while_experts_come(move: Move) -> None:
    load = move.begin_load()
    move.service.set_placement(PlacementNotice(term=1, generation=3))
    move.service.unload(term=1, experts=[ExpertId(layer=9, index=9)])
    status = move.service.status()
    assert (status.placement, status.experts) == ((1, 3), EXPERTS[:1])
    assert ask(move.service, make_batch({0: [0]}, rows=1, width=WIDTH, layer=LAYER)).y_ND is not None
    assert not load.done()
    move.peer.go.set()
    assert load.result(TIMEOUT_S) == move.service.status().hosted_bytes
    assert move.service.status().experts == EXPERTS


def test_a_load_of_a_controller_that_is_over_stops_at_once(move: Move) -> None:
    load = move.begin_load()
    move.service.set_placement(PlacementNotice(term=2, generation=1))
    with pytest.raises(StaleRequest, match="controller term 1 is superseded by term 2"):
        load.result(TIMEOUT_S)  # while the peer still sends nothing
    assert move.service.status().experts == EXPERTS[:1]
    move.peer.go.set()
    assert move.load(term=2) > 0 and move.service.status().experts == EXPERTS


def test_a_load_that_waits_for_its_turn_is_fenced_too(move: Move) -> None:
    loads = [move.begin_load(), move.begin(move.load)]
    wait_until(lambda: move.service.fence.loads_under_way == 2, "the second load")
    move.service.unload(term=2, experts=[])
    for load in loads:
        with pytest.raises(StaleRequest, match="controller term 1 is superseded"):
            load.result(TIMEOUT_S)
    assert move.service.status().experts == EXPERTS[:1]


def test_what_is_unloaded_while_it_is_loaded_does_not_come(move: Move) -> None:
    load = move.begin_load()
    move.service.unload(term=1, experts=EXPERTS[:3])  # one copied, one being copied, one not requested yet
    move.peer.go.set()
    with pytest.raises(StaleRequest, match=r"unloaded while they were loaded: 1/0, 1/1, 1/2 \(layer/index\)"):
        load.result(TIMEOUT_S)
    assert move.service.status().experts == EXPERTS[3:]
    assert EXPERTS[2] not in move.peer.copies
    assert move.load() > 0 and move.service.status().experts == EXPERTS


def test_two_loads_of_an_expert_bring_it_once(move: Move) -> None:
    loads = [move.begin_load(experts=EXPERTS[:2]), move.begin(move.load)]
    wait_until(lambda: move.service.fence.loads_under_way == 2, "the second load")
    move.peer.go.set()
    loaded = [load.result(TIMEOUT_S) for load in loads]
    assert sum(loaded) == move.service.status().hosted_bytes and loaded[0] == loaded[1] > 0
    assert move.peer.copies == Counter(EXPERTS)


def test_a_load_waits_for_others_no_longer_than_its_time(move: Move) -> None:
    move.begin_load()
    with pytest.raises(DeadlineExceeded, match=r"another load took longer than 0\.05 s"):
        move.load(timeout_s=0.05)


def test_an_expert_that_is_named_twice_comes_once(move: Move) -> None:
    move.peer.go.set()
    assert move.load(experts=(*EXPERTS, *EXPERTS)) == move.service.status().hosted_bytes
    assert move.peer.copies == Counter(EXPERTS)


# -- what a peer sends --


def parameters(service: ExpertService) -> dict[tuple[ExpertId, str], torch.Tensor]:
    return {(t.expert, t.name): t.value for t in service.export(experts=EXPERTS, with_optimizer=False)}


def test_a_peer_that_trains_gives_what_is_committed(move: Move, checkpoint: Path) -> None:
    with training(checkpoint, "trainer", optimizer=OptimizerSettings(name="sgd")) as trainer:
        for value in trainer.store.get(EXPERTS[1]).module.parameters():
            value.data.add_(1.0)
        peer = HeldPeer(trainer)
        peer.go.set()
        with closing(ExpertService(is_given=any_directory, name="b", connect_peer=peer.connect)) as service:
            service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=peer.address))
            ours, theirs = parameters(service), parameters(trainer)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
            assert not any(p.requires_grad for e in EXPERTS for p in service.store.get(e).module.parameters())


def test_experts_are_not_trained_from_a_peer(move: Move) -> None:
    with pytest.raises(InvalidMessage, match="peer_address: experts are trained from a checkpoint on"):
        move.load(optimizer=OptimizerSettings(), training_term=1)


def test_a_copy_needs_no_turn_of_the_computing_thread(move: Move) -> None:
    move.peer.go.set()
    with computing(move.peer.service):
        assert move.begin(move.load).result(TIMEOUT_S) > 0


def test_an_order_of_another_dtype_than_the_peer_s_leaves_it_to_the_checkpoint(move: Move) -> None:
    move.peer.go.set()
    with pytest.raises(Unavailable, match=r"1/0 cannot be copied from peer: .*float32.* the model has torch\.bfloat16"):
        move.load(dtype="bfloat16")
    assert move.service.status().experts == ()


def test_what_the_model_does_not_have_is_asked_of_no_peer(move: Move) -> None:
    with pytest.raises(InvalidMessage, match="the model has no 1/4"):
        move.load(experts=(*EXPERTS, ExpertId(layer=LAYER, index=4)))
    assert not move.peer.copies


# -- weight versions --


def at_version(service: ExpertService, checkpoint: Path, version: int) -> None:
    service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), replace=True, weight_version=version))


def test_an_empty_actor_takes_the_peer_s_weight_version(move: Move, checkpoint: Path) -> None:
    at_version(move.peer.service, checkpoint, 3)
    move.peer.go.set()
    move.load()
    assert move.service.status().weight_version == 3
    exported = move.service.export(experts=EXPERTS, with_optimizer=False)
    assert {tensor.weight_version for tensor in exported} == {3}
    assert ask(move.service, batch_of(weight_version=3)).y_ND is not None


def test_versions_are_not_mixed_on_one_actor(move: Move, checkpoint: Path) -> None:
    move.service.load(LoadRequest(term=1, experts=EXPERTS[:1], checkpoint=str(checkpoint), weight_version=2))
    at_version(move.peer.service, checkpoint, 3)
    move.peer.go.set()
    with pytest.raises(StaleRequest, match="expert 1/1: the peer has weight version 3, 2 is wanted here"):
        move.load()
    assert (move.service.status().experts, move.service.status().weight_version) == (EXPERTS[:1], 2)
    move.load(weight_version=3)  # besides the other
    assert (move.service.status().experts, move.service.status().weight_version) == (EXPERTS, 3)
    assert move.service.status().other_versions == {2: EXPERTS[:1]}


def test_the_version_that_is_ordered_is_the_one_that_comes(move: Move, checkpoint: Path) -> None:
    at_version(move.peer.service, checkpoint, 3)
    move.peer.go.set()
    with pytest.raises(Unavailable, match="expert 1/0 is not here in weight version 4"):
        move.load(weight_version=4)
    assert move.service.status().experts == ()
    assert move.load(weight_version=3) > 0 and move.service.status().weight_version == 3


# -- the pace of a copy --


def test_bytes_come_no_faster_than_allowed() -> None:
    now_s = [100.0]
    pace = BytePace(1000, clock=lambda: now_s[0])
    assert pace.wait_s <= 0
    pace.count(500)
    assert pace.wait_s == pytest.approx(0.5)
    now_s[0] += 0.4
    pace.count(200)
    assert pace.wait_s == pytest.approx(0.3)
    now_s[0] += 60.0  # a pause saves nothing up
    pace.count(1000)
    assert pace.wait_s == pytest.approx(1.0)


def test_without_a_limit_nothing_waits() -> None:
    pace = BytePace(0)
    pace.count(10**12)
    assert pace.wait_s <= 0


def test_a_throttled_copy_ends_with_its_order(move: Move) -> None:
    move.peer.go.set()
    with pytest.raises(DeadlineExceeded, match=r"1/0: not loaded within 0\.3 s"):
        move.load(max_bytes_per_s=1, timeout_s=0.3)
    load = move.begin(move.load, max_bytes_per_s=1)
    while move.peer.copies[EXPERTS[0]] < 2:
        time.sleep(0.002)
    move.service.set_placement(PlacementNotice(term=2, generation=1))
    with pytest.raises(StaleRequest, match="controller term 1 is superseded"):
        load.result(TIMEOUT_S)

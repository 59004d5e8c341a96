"""Experts copied from one actor to another over loopback gRPC: bit for bit, throttled, and when the peer fails."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moecluster.errors import DeadlineExceeded, StaleRequest, Unavailable
from moecluster.expert.service import ExpertService
from moecluster.models.experts.source import ExpertSource
from moecluster.proto import expert_pb2
from moecluster.rpc.expert import export as export_chunks
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.interface import ExportedTensor
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.server import RunningServer
from moecluster.types import ActorAddress, ExpertId
from tests.support.clusters.given import any_directory
from tests.support.expert.batches import assert_same_fields, make_batch
from tests.support.expert.small_actor import EXPERTS, TIMEOUT_S, ask, batch_of, open_stream, result_of, served, serving
from tests.support.models.families import make_model, save
from tests.support.waiting import wait_until

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def address_of(service: ExpertService, server: RunningServer) -> ActorAddress:
    return ActorAddress(actor=service.name, address=server.address, incarnation=service.incarnation)


@pytest.fixture
def peer(checkpoint: Path) -> Iterator[ExpertService]:
    with serving(checkpoint, "peer") as service:
        yield service


@pytest.fixture
def peer_address(peer: ExpertService) -> Iterator[ActorAddress]:
    with served(peer) as server:
        yield address_of(peer, server)


@pytest.fixture
def taker() -> Iterator[ExpertService]:
    """An actor without experts."""
    with closing(ExpertService(is_given=any_directory, name="taker")) as service:
        yield service


@pytest.fixture
def control(taker: ExpertService) -> Iterator[GrpcExpertControl]:
    with served(taker) as server, closing(GrpcExpertControl("taker", server.address)) as control:
        yield control


# -- bit for bit --


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("family", ["moecluster", "mixtral", "gpt_oss", "nemotron_h"])
def test_copied_experts_are_those_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    monkeypatch.setattr(export_chunks, "CHUNK_BYTES", 1000)
    save(make_model(family), tmp_path, "per-expert")
    layers = ExpertSource(tmp_path).layers
    experts = tuple(ExpertId(layer=layer.layer, index=index) for layer in layers for index in range(layer.num_experts))
    with (
        closing(ExpertService(is_given=any_directory, name="peer")) as peer,
        closing(ExpertService(is_given=any_directory, name="taker")) as taker,
    ):
        held_bytes = peer.load(LoadRequest(term=1, experts=experts, checkpoint=str(tmp_path), dtype=dtype))
        with (
            served(peer) as server,
            served(taker) as taker_server,
            closing(GrpcExpertControl("taker", taker_server.address)) as control,
        ):
            loaded_bytes = control.load(
                LoadRequest(
                    term=1, experts=experts, checkpoint=str(tmp_path), dtype=dtype, peer=address_of(peer, server)
                )
            )
        assert loaded_bytes == held_bytes == taker.status().hosted_bytes and taker.status().experts == experts
        for expert in experts:
            theirs, ours = peer.store.get(expert).module, taker.store.get(expert).module
            check_same_parameters(theirs, ours)
        for layer in layers:
            rows = {index: [0, 1, 2] for index in range(layer.num_experts)}
            batch = make_batch(rows, rows=3, width=layer.hidden_size, layer=layer.layer, dtype=DTYPES[dtype])
            assert_same_fields(ask(taker, batch), ask(peer, batch))


def check_same_parameters(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Equal to the last bit, of one form, in one order, and packed where the others are."""
    assert type(ours) is type(theirs)
    pairs = list(zip(ours.named_parameters(), theirs.named_parameters(), strict=True))
    assert pairs
    for (name, value), (other_name, other) in pairs:
        assert name == other_name
        assert (value.dtype, value.shape, value.is_mkldnn) == (other.dtype, other.shape, other.is_mkldnn)
        assert value.requires_grad == other.requires_grad is False
        plain, other_plain = (v.to_dense() if v.is_mkldnn else v for v in (value, other))
        as_bytes = (v.detach().contiguous().view(torch.uint8) for v in (plain, other_plain))
        assert torch.equal(*as_bytes)


# -- a peer that sends wrong data --


class Tampered:
    """An actor whose exports have one defect."""

    def __init__(self, service: ExpertService, change: Callable[[ExportedTensor], ExportedTensor]) -> None:
        self._service, self._change = service, change

    def export(self, **order: Any) -> Iterator[ExportedTensor]:
        for tensor in self._service.export(**order):
            yield self._change(tensor) if tensor.expert == EXPERTS[2] else tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: replace(t, value=t.value[:-1]), r"float32 \[\d+, \d+\], the model has torch\.float32 \["),
        (lambda t: replace(t, value=t.value.t()), r"the model has torch\.float32 \["),
        (lambda t: replace(t, value=t.value.repeat(3, 1)), r"shape: \[\d+, \d+\] of .* is too large"),
        (lambda t: replace(t, value=t.value.bfloat16()), r"torch\.bfloat16 \[\d+, \d+\], the model has torch\.float32"),
        (lambda t: replace(t, name="other"), "name: 1/2 other was not asked for or came twice"),
        (lambda t: replace(t, name="down_proj.weight"), "down_proj.weight"),
        (lambda t: replace(t, expert=EXPERTS[3]), "name: 1/3 .* was not asked for"),
        (
            lambda t: replace(t, weight_version=int(t.name.startswith("down"))),
            r"weight_version: \[0, 1\] within one expert",
        ),
    ],
    ids=["rows", "transposed", "large", "dtype", "name", "twice", "expert", "version"],
)
def test_what_does_not_fit_the_model_is_not_taken(
    peer: ExpertService,
    taker: ExpertService,
    control: GrpcExpertControl,
    checkpoint: Path,
    change: Callable[[ExportedTensor], ExportedTensor],
    complaint: str,
) -> None:
    server = serve_expert(Tampered(peer, change), credentials=None)
    with pytest.raises(Unavailable, match=f"expert 1/2 cannot be copied from {server.address}: .*{complaint}"):
        control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=address_of(peer, server)))
    server.stop(0.0)
    check_the_rest_comes_from_the_checkpoint(taker, control, checkpoint)


def check_the_rest_comes_from_the_checkpoint(
    taker: ExpertService, control: GrpcExpertControl, checkpoint: Path
) -> None:
    """Experts copied before the peer failed stay and serve; the others can be loaded from the checkpoint."""
    came = taker.status().experts
    assert came == EXPERTS[: len(came)] and 0 < len(came) < len(EXPERTS)
    first = make_batch({0: [0]}, rows=1, width=32, layer=EXPERTS[0].layer)
    assert ask(taker, first).y_ND is not None
    kept = {e: taker.store.get(e).module for e in came}
    assert control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint))) > 0
    assert taker.status().experts == EXPERTS
    assert all(taker.store.get(e).module is module for e, module in kept.items())


def test_a_parameter_that_does_not_come_is_missed(
    peer: ExpertService, control: GrpcExpertControl, checkpoint: Path
) -> None:
    class Forgetful(Tampered):
        def export(self, **order: Any) -> Iterator[ExportedTensor]:
            return (tensor for tensor in self._service.export(**order) if not tensor.name.startswith("down"))

    server = serve_expert(Forgetful(peer, lambda tensor: tensor), credentials=None)
    with pytest.raises(Unavailable, match=r"name: down_proj\.weight did not come"):
        control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=address_of(peer, server)))
    server.stop(0.0)


def test_bytes_that_changed_on_their_way_are_noticed(
    peer_address: ActorAddress,
    taker: ExpertService,
    control: GrpcExpertControl,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    really_cut = export_chunks.cut

    def cut(tensor: ExportedTensor) -> Iterator[expert_pb2.ExportChunk]:
        for chunk in really_cut(tensor):
            if tensor.expert == EXPERTS[2]:
                chunk.content = bytes([chunk.content[0] ^ 1]) + chunk.content[1:]
            yield chunk

    monkeypatch.setattr(export_chunks, "cut", cut)
    with pytest.raises(Unavailable, match=r"expert 1/2 .*: content: the checksum of 1/2 .* is wrong"):
        control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=peer_address))
    check_the_rest_comes_from_the_checkpoint(taker, control, checkpoint)


def test_another_incarnation_of_the_peer_is_not_copied_from(
    peer_address: ActorAddress, peer: ExpertService, control: GrpcExpertControl, checkpoint: Path
) -> None:
    earlier = replace(peer_address, incarnation="an-earlier-life")
    with pytest.raises(Unavailable, match=f"this is incarnation {peer.incarnation}, not an-earlier-life"):
        control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=earlier))
    assert control.status().experts == ()


def test_a_peer_that_has_unloaded_an_expert_gives_the_others(
    peer: ExpertService, peer_address: ActorAddress, taker: ExpertService, control: GrpcExpertControl, checkpoint: Path
) -> None:
    peer.unload(term=1, experts=EXPERTS[3:])
    with pytest.raises(Unavailable, match=r"expert 1/3 cannot be copied from .*: expert 1/3 is not here"):
        control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=peer_address))
    check_the_rest_comes_from_the_checkpoint(taker, control, checkpoint)


def test_a_peer_of_another_weight_version_is_refused(
    peer: ExpertService, peer_address: ActorAddress, control: GrpcExpertControl, checkpoint: Path
) -> None:
    peer.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), replace=True, weight_version=3))
    with pytest.raises(Unavailable, match="is not here in weight version 2"):
        control.load(
            LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=peer_address, weight_version=2)
        )
    control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=peer_address))
    assert control.status().weight_version == 3


# -- a peer that goes away --


def slow(bytes_of_one: int, seconds_each: float) -> int:
    return int(bytes_of_one / seconds_each)


def wait_for_experts(service: ExpertService, count: int) -> None:
    wait_until(lambda: len(service.status().experts) >= count, f"{count} loaded experts")


def load_slowly(control: GrpcExpertControl, checkpoint: Path, peer: ActorAddress, held_bytes: int) -> int:
    """Takes half a second for each of the experts."""
    return control.load(
        LoadRequest(
            term=1,
            experts=EXPERTS,
            checkpoint=str(checkpoint),
            peer=peer,
            max_bytes_per_s=slow(held_bytes // len(EXPERTS), 0.5),
        )
    )


def test_a_peer_whose_server_stops_midway(
    peer: ExpertService, taker: ExpertService, control: GrpcExpertControl, checkpoint: Path
) -> None:
    server = serve_expert(peer, credentials=None)
    with ThreadPoolExecutor(1) as threads:
        held_bytes = peer.status().hosted_bytes
        load = threads.submit(load_slowly, control, checkpoint, address_of(peer, server), held_bytes)
        wait_for_experts(taker, 1)
        server.stop(0.0)
        with pytest.raises(Unavailable, match="cannot be copied from"):
            load.result(TIMEOUT_S)
    check_the_rest_comes_from_the_checkpoint(taker, control, checkpoint)


PEER_PROCESS = """
import sys
from pathlib import Path
from moecluster.rpc.expert.server import serve_expert
from tests.support.expert.small_actor import serving

with serving(Path(sys.argv[1]), "peer") as service:
    server = serve_expert(service, credentials=None)
    print(server.address, service.incarnation, service.status().hosted_bytes, flush=True)
    sys.stdin.read()
"""


@contextmanager
def peer_process(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], ActorAddress, int]]:
    """A peer in its own process, its address, and the bytes that it holds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PEER_PROCESS, str(checkpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60.0)[0], "the peer did not start"
        address, incarnation, held_bytes = process.stdout.readline().split()
        yield process, ActorAddress(actor="peer", address=address, incarnation=incarnation), int(held_bytes)
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def test_a_peer_that_is_killed_midway(taker: ExpertService, control: GrpcExpertControl, checkpoint: Path) -> None:
    with peer_process(checkpoint) as (process, address, held_bytes), ThreadPoolExecutor(1) as threads:
        load = threads.submit(load_slowly, control, checkpoint, address, held_bytes)
        wait_for_experts(taker, 1)
        process.send_signal(signal.SIGKILL)
        with pytest.raises(Unavailable, match="cannot be copied from"):
            load.result(TIMEOUT_S)
    check_the_rest_comes_from_the_checkpoint(taker, control, checkpoint)


def test_a_peer_that_hangs_holds_up_no_newer_controller(
    taker: ExpertService, control: GrpcExpertControl, checkpoint: Path
) -> None:
    with peer_process(checkpoint) as (process, address, held_bytes), ThreadPoolExecutor(1) as threads:
        load = threads.submit(load_slowly, control, checkpoint, address, held_bytes)
        wait_for_experts(taker, 1)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)  # until the next expert is requested
        assert not load.done()
        control.set_placement(PlacementNotice(term=2, generation=1))
        with pytest.raises(StaleRequest, match="controller term 1 is superseded"):
            load.result(1.0)
        with pytest.raises((Unavailable, DeadlineExceeded)):
            control.load(LoadRequest(term=2, experts=EXPERTS, checkpoint=str(checkpoint), peer=address, timeout_s=1.0))
    assert control.load(LoadRequest(term=2, experts=EXPERTS, checkpoint=str(checkpoint))) > 0
    assert taker.status().experts == EXPERTS


def test_a_peer_that_never_was(taker: ExpertService, control: GrpcExpertControl, checkpoint: Path) -> None:
    nobody = ActorAddress(actor="peer", address="127.0.0.1:1", incarnation="x")
    with pytest.raises(Unavailable, match=r"expert 1/0 cannot be copied from 127\.0\.0\.1:1"):
        control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=nobody))


# -- while others are served --


def test_a_throttled_copy_takes_its_time_and_both_ends_serve_meanwhile(
    peer: ExpertService, peer_address: ActorAddress, taker: ExpertService, control: GrpcExpertControl, checkpoint: Path
) -> None:
    held_bytes = peer.status().hosted_bytes
    expected = ask(peer, batch_of(5))
    first = make_batch({0: [0, 1]}, rows=2, width=32, layer=EXPERTS[0].layer)
    begun_s = time.monotonic()
    with ThreadPoolExecutor(1) as threads, closing(open_stream(peer_address.address)) as stream:
        load = threads.submit(load_slowly, control, checkpoint, peer_address, held_bytes)
        wait_for_experts(taker, 1)
        answers = 0
        while not load.done():
            answer = result_of(stream, batch_of(5))
            assert_same_fields(replace(answer, request_id=expected.request_id), expected)
            assert_same_fields(ask(taker, first), ask(peer, first))
            answers += 1
        assert load.result() == held_bytes
    took_s = time.monotonic() - begun_s
    assert 1.8 < took_s < 20.0  # 4 experts of half a second
    assert answers > 20
    assert control.load(
        LoadRequest(
            term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=peer_address, replace=True, max_bytes_per_s=2**40
        )
    )
    assert time.monotonic() - begun_s - took_s < 1.0


def test_an_actor_gives_its_experts_to_several_at_once(
    peer: ExpertService, peer_address: ActorAddress, checkpoint: Path
) -> None:
    takers = [ExpertService(is_given=any_directory, name=f"taker-{i}") for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        request = LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), peer=peer_address)
        loads = [threads.submit(taker.load, request) for taker in takers]
        assert {load.result(TIMEOUT_S) for load in loads} == {peer.status().hosted_bytes}
    for taker in takers:
        assert_same_fields(ask(taker, batch_of(3)), ask(peer, batch_of(3)))
        taker.close()

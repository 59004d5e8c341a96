"""Actors that join and leave: a router keeps no memory, descriptor or thread of an actor that is gone."""

import os
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from moecluster.dispatch import connection_pool
from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.errors import Unavailable
from moecluster.rpc.controller.in_process import FixedPlacement
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.types import ActorAddress, Placement, Replica
from tests.support.expert.small_actor import EXPERTS, SEGMENT_BYTES, TIMEOUT_S, batch_of, check_rows, served, serving

ACTORS = 20
STREAMS = ("stream-", "compute-stream", "compute-mailbox")  # threads of either side


def connect(address: ActorAddress) -> GrpcExpertTransport:
    return GrpcExpertTransport(address, router="test", shared_memory_bytes=SEGMENT_BYTES)


def placement_of(*addresses: ActorAddress, generation: int = 1) -> Placement:
    """A placement with all experts on the first actor."""
    return Placement(
        term=1, generation=generation, layer_experts={1: 4}, actors={a.actor: a for a in addresses},
        replicas=tuple(Replica(expert=expert, actor=addresses[0].actor, share=1.0) for expert in EXPERTS),
    )  # fmt: skip


def pool_of(placement: Placement) -> ExpertPool:
    return ExpertPool(
        FixedPlacement(placement),
        connect=connect,
        control=lambda address: GrpcExpertControl(address.actor, address.address),
    )


def mapped_segments() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:moecluster-rows")


def held_segments() -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.islink(link) and "moecluster-rows" in _target(link) for link in links)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed since
        return ""


def stream_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(STREAMS)]


def wait_for_nothing_held(descriptors: int) -> None:
    """descriptors: of segments held before the test."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while (found := (mapped_segments(), held_segments(), stream_threads())) != (0, descriptors, []):
        assert time.monotonic() < deadline_s, found
        time.sleep(0.01)


@pytest.mark.usefixtures("without_collector")
def test_twenty_actors_that_joined_and_left_leave_nothing_behind(
    checkpoint: Path, modules: dict[int, nn.Module]
) -> None:
    before = held_segments()
    wait_for_nothing_held(before)
    with ExitStack() as actors, serving(checkpoint) as service:
        addresses = []
        for number in range(ACTORS):
            server = actors.enter_context(served(service))
            addresses.append(
                ActorAddress(actor=f"expert-{number}", address=server.address, incarnation=service.incarnation)
            )
        pool = pool_of(placement_of(*addresses))
        with closing(pool):
            transports = [pool.transport(address) for address in addresses]
            for transport in transports:
                batch = batch_of(40)
                check_rows(modules, batch, transport.submit(batch).result(TIMEOUT_S))
            assert mapped_segments() == 4 * ACTORS, "in one process: the segment of each end, mapped by both"
            actors.close()  # they leave; nothing uses them any more
            wait_for_nothing_held(before)
            with pytest.raises(Unavailable):
                transports[0].submit(batch_of()).result(TIMEOUT_S)


@pytest.mark.usefixtures("without_collector")
def test_the_way_to_an_actor_without_a_place_is_closed_though_it_still_listens(
    checkpoint: Path, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptors = held_segments()
    with serving(checkpoint) as service, served(service) as server, served(service) as other:
        stays, leaves = (
            ActorAddress(actor=name, address=at.address, incarnation=service.incarnation)
            for name, at in (("stays", server), ("leaves", other))
        )
        before = placement_of(stays, leaves)
        with closing(pool_of(before)) as pool:
            pool.table(before, 1)
            kept, left = pool.transport(stays), pool.transport(leaves)
            after = placement_of(stays, generation=2)
            pool.table(after, 1)
            batch = batch_of()
            check_rows(modules, batch, left.submit(batch).result(TIMEOUT_S))  # of a request planned before
            monkeypatch.setattr(connection_pool, "LEFT_S", 0.0)
            pool.table(replace(after, generation=3), 1)
            with pytest.raises(Unavailable, match="was closed"):
                left.submit(batch).result(TIMEOUT_S)
            check_rows(modules, batch, kept.submit(batch).result(TIMEOUT_S))
            assert pool.transport(stays) is kept and pool.transport(leaves) is not left
    wait_for_nothing_held(descriptors)

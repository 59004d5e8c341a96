"""Rows that travel inline for want of memory: said in state and metrics, and shared memory again once there is some."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.types import ActorAddress
from tests.support.clusters.expert_cluster import SHARED_MEMORY_BYTES, ExpertCluster
from tests.support.exhaustion.descriptors import no_descriptors
from tests.support.expert.small_layer import check_served
from tests.support.in_child import ROOT, TIMEOUT_S, mounted


@contextmanager
def no_memory_to_share() -> Iterator[None]:
    """Context: no segment can be allocated in this process, nor in its actors."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARED_MEMORY_BYTES // 2, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def cluster(checkpoint: Path) -> Iterator[ExpertCluster]:
    with ExpertCluster(checkpoint, transport="shm") as running:
        yield running


@contextmanager
def routing(cluster: ExpertCluster, *, lane_retry_s: float) -> Iterator[tuple[ExpertPool, RemoteExperts]]:
    """Context: a router's connections to the actors, none of which is open yet."""

    def connect(address: ActorAddress) -> GrpcExpertTransport:
        return GrpcExpertTransport(address, router="test", shared_memory_bytes=SHARED_MEMORY_BYTES)

    pool = ExpertPool(cluster.placements, connect=connect, control=cluster.control, lane_retry_s=lane_retry_s)
    remote = RemoteExperts(pool, timeout_s=20.0)
    try:
        yield pool, remote
    finally:
        remote.close()


def test_the_lane_is_changed_when_there_is_memory_again(cluster: ExpertCluster, modules: dict[int, nn.Module]) -> None:
    with routing(cluster, lane_retry_s=0.0) as (pool, remote):
        with no_memory_to_share():
            for seed in range(3):
                check_served(remote, modules, seed)
            short = pool.shortages()
            assert list(short) == ["expert-0", "expert-1"]
            assert all("bytes of memory to share cannot be had (File too large)" in why for why in short.values())
            assert {(lane.lane, lane.reason) for lane in pool.lanes()} == {("inline", "no_memory")}
        for seed in range(3):
            check_served(remote, modules, seed)
        assert pool.shortages() == {}
        assert {(lane.lane, lane.reason) for lane in pool.lanes()} == {("shm", "best")}


def test_it_is_not_tried_at_every_message(cluster: ExpertCluster, modules: dict[int, nn.Module]) -> None:
    with routing(cluster, lane_retry_s=600.0) as (pool, remote):
        with no_memory_to_share():
            check_served(remote, modules, 0)
        transports = {address.actor: pool.transport(address) for address in cluster.placement.actors.values()}
        check_served(remote, modules, 1)
        assert pool.shortages().keys() == transports.keys()
        assert all(pool.transport(a) is transports[a.actor] for a in cluster.placement.actors.values())


def test_a_lack_of_descriptors_costs_no_open_lane(cluster: ExpertCluster, modules: dict[int, nn.Module]) -> None:
    with routing(cluster, lane_retry_s=0.0) as (pool, remote):
        check_served(remote, modules, 0)
        with no_descriptors():
            for seed in range(3):
                check_served(remote, modules, seed)
        assert [(lane.actor, lane.lane) for lane in pool.lanes()] == [("expert-0", "shm"), ("expert-1", "shm")]


def test_a_full_dev_shm_does_not_matter(checkpoint: Path) -> None:
    done = subprocess.run(
        [
            *mounted("size=64k", "/dev/shm"),
            *(sys.executable, "-m", "tests.support.exhaustion.full_shared_memory", str(checkpoint)),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

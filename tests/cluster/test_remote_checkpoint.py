"""Actors on nodes without the checkpoint directory read it from the source that announced it."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.checkpoint_actor import CheckpointSource, announce
from actors.given_directories import GivenDirectories
from actors.names import SOURCE
from actors.ray_calls import call, find_actor
from actors.spawn import spawn
from moecluster.errors import NotGiven
from moecluster.rpc.controller.client import set_checkpoint
from tests.support.clusters.ray_cluster import CREDENTIALS, RayCluster, wait_for_result
from tests.support.clusters.ray_session import RaySession

PROMPT = "def add(a, b):"
NEW_TOKENS = 60
NAME = "/nowhere/on/these/nodes"


@pytest.fixture(scope="module")
def cluster(ray_session: RaySession, directory: str) -> Iterator[RayCluster]:
    with RayCluster(directory, {"cluster": {"num_expert_actors": 2}}) as running:
        yield running


def text(cluster: RayCluster) -> str:
    with cluster.client() as client:
        return client.generate(PROMPT, max_new_tokens=NEW_TOKENS).text()


def test_actors_and_router_load_what_they_do_not_see(cluster: RayCluster, directory: str) -> None:
    expected = text(cluster)
    assert not Path(NAME).exists()
    name = cluster.config.cluster.name
    announce(name, directory)  # a no-op: there is no source yet
    node = ray.get_runtime_context().get_node_id()
    tables = cluster.config.to_tables()
    spawn(CheckpointSource, "source", cluster.config, SOURCE, tables, CREDENTIALS, directory, node=node)
    other = f"{SOURCE}-other"  # as on another node, whose training writes checkpoints there
    spawn(CheckpointSource, "source", cluster.config, other, tables, CREDENTIALS, directory, node=node)
    call(find_actor(other, name).announce.remote(NAME, directory), 60.0, other)
    announce(name, directory)

    with pytest.raises(NotGiven, match=f"{NAME}: the cluster was not given this directory"):
        set_checkpoint(cluster.driver.controller_address(), NAME, credentials=CREDENTIALS)
    cluster.driver.give_directory(NAME)
    assert GivenDirectories(name)(NAME) and not GivenDirectories(f"{name}-2")(NAME), "of this cluster alone"
    set_checkpoint(cluster.driver.controller_address(), NAME, credentials=CREDENTIALS)
    for actor in ("expert-0", "expert-1"):
        old = cluster.kill(actor, signal.SIGKILL)
        wait_for_result(lambda actor=actor, old=old: cluster.pids().get(actor, old) != old, f"{actor} is started again")
    status = cluster.wait_served()
    assert status.checkpoint == NAME
    cluster.driver.training(CREDENTIALS).reload(NAME)
    assert text(cluster) == expected

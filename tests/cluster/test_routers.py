"""Several routers of one cluster generate the same tokens, also after one of them is lost."""

import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.names import is_router
from moecluster.client import Client
from moecluster.errors import MoeClusterError, Unavailable, UserError
from moecluster.rpc.controller.client import ControllerCalls, set_checkpoint
from moecluster.rpc.router.training_messages import RunGone
from moecluster.training.events import decode_event
from moecluster.training.run_paths import run_paths
from moecluster.types import ExpertId, RouterStatus
from tests.support.clusters.ray_cluster import CREDENTIALS, RayCluster, wait_for_result
from tests.support.clusters.ray_session import RaySession
from tests.support.soak.generation_load import save_decided_model
from tests.support.training.training_runs import losses, make_config, write_text

PROMPTS = ("def add(a, b):", "The tower of", "import os")
NEW_TOKENS = 200
ROUTERS = ("router", "router-1")


@pytest.fixture(scope="module")
def cluster(ray_session: RaySession, directory: str) -> Iterator[RayCluster]:
    with RayCluster(directory, {"cluster": {"num_expert_actors": 2, "num_routers": 2}}) as running:
        yield running


def addresses(cluster: RayCluster) -> dict[str, str]:
    """Router -> its current address."""
    found = cluster.driver.endpoints()
    return {name: reached.address for name, reached in found.items() if is_router(name) and reached is not None}


def texts(address: str) -> dict[str, str]:
    """Each prompt's output from one router, one after the other."""
    with Client(address, credentials=CREDENTIALS) as client:
        return {prompt: client.generate(prompt, max_new_tokens=NEW_TOKENS).text() for prompt in PROMPTS}


def status(address: str) -> RouterStatus | None:
    try:
        with Client(address, credentials=CREDENTIALS) as client:
            return client.status()
    except MoeClusterError:
        return None


def test_routers_write_the_same_requests_at_the_same_time(cluster: RayCluster) -> None:
    at = addresses(cluster)
    assert tuple(sorted(at)) == ROUTERS and sorted(at.values()) == sorted(cluster.driver.router_addresses())
    alone = texts(at["router"])
    assert len(set(alone.values())) == len(PROMPTS)
    together: dict[str, dict[str, str]] = {}
    threads = [threading.Thread(target=lambda n=name: together.update({n: texts(at[n])})) for name in ROUTERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert together == dict.fromkeys(ROUTERS, alone)


def test_each_has_a_lease_a_name_and_metrics_of_its_own(cluster: RayCluster) -> None:
    wait_for_result(lambda: cluster.wait_served().routers == 2, "both have leases")
    found = cluster.driver.endpoints()
    for name in ROUTERS:
        reached = found[name]
        assert reached is not None and reached.actor == name
        seen = status(reached.address)
        assert seen is not None and seen.router == name
        texts(reached.address)
        with urllib.request.urlopen(f"http://{reached.metrics_address}/metrics", timeout=10) as answer:
            assert "moecluster_expert_tokens_total" in answer.read().decode()


@pytest.mark.parametrize("victim", ROUTERS)
def test_when_one_is_killed_the_other_serves_on_and_it_comes_back(cluster: RayCluster, victim: str) -> None:
    """Its request continues on the other router; the router that Ray restarts is found again and generates the same."""
    before, pid = addresses(cluster), cluster.pids()[victim]
    other = next(name for name in ROUTERS if name != victim)
    whole = texts(before[other])
    bystander: dict[str, str] = {}
    writing = threading.Thread(target=lambda: bystander.update(texts(before[other])))
    writing.start()
    with Client([before[victim], before[other]], credentials=CREDENTIALS) as client:
        chunks = iter(client.generate(PROMPTS[0], max_new_tokens=NEW_TOKENS))
        begun = next(chunks).text
        cluster.kill(victim)
        assert begun + "".join(chunk.text for chunk in chunks) == whole[PROMPTS[0]]
    writing.join(60.0)
    assert bystander == whole

    wait_for_result(lambda: cluster.pids().get(victim, pid) != pid, f"{victim} is started again")
    again = addresses(cluster)[victim]
    assert texts(again) == whole
    assert set(cluster.driver.router_addresses()) == {again, before[other]}
    wait_for_result(lambda: cluster.wait_served().routers == 2, "both have leases")


def test_a_router_that_is_started_again_serves_what_training_has_come_to(cluster: RayCluster, tmp_path: Path) -> None:
    """Not the cluster's initial model, since the experts are from the newest checkpoint by then."""
    newest = save_decided_model(tmp_path)
    cluster.driver.give_directory(newest)
    set_checkpoint(cluster.driver.controller_address(), newest, credentials=CREDENTIALS)
    pid = cluster.kill("router-1")
    wait_for_result(lambda: cluster.pids().get("router-1", pid) != pid, "router-1 is started again")
    seen = status(addresses(cluster)["router-1"])
    assert seen is not None and seen.model == newest


def test_a_training_run_holds_the_placement_and_ends_with_the_first_router(
    cluster: RayCluster, directory: str, tmp_path: Path
) -> None:
    def held() -> bool:
        seen = cluster.status()
        return seen is not None and seen.held

    def says_that_the_run_is_gone() -> bool:
        try:
            return run.progress(0).ended
        except RunGone:
            return True
        except Unavailable:
            return False  # it is restarting

    assert not held()
    endless: dict[str, Any] = {"steps": 10**6, "checkpoint_every_steps": 0, "participant_timeout_s": 2.0}
    config = make_config(write_text(tmp_path), tmp_path / "run", **endless)
    for path in run_paths(config, directory):
        cluster.driver.give_directory(path)
    run = cluster.driver.training(CREDENTIALS)
    run.start(config.to_tables(), directory)
    wait_for_result(lambda: losses([decode_event(line) for line in run.progress(0).events]), "a step is done")
    assert held()
    refused = pytest.raises(UserError, match="a training run holds the placement")
    with ControllerCalls(cluster.driver.controller_address(), credentials=CREDENTIALS) as calls, refused:
        calls.place(ExpertId(layer=0, index=0), ["expert-1"])
    cluster.kill("router")
    wait_for_result(says_that_the_run_is_gone, "the router that was started again says that the run is gone")
    wait_for_result(lambda: not held(), "its lease is over")

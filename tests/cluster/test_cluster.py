"""A real cluster: its generated tokens, and its recovery when processes are killed."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.driver import Cluster
from moecluster.client import Client
from moecluster.config import Config, read_config
from moecluster.errors import ConfigError, ResourceError
from moecluster.models.config import read_model_config
from moecluster.rpc.controller.client import controller_status
from moecluster.types import ActorPhase
from tests.support.clusters.ray_cluster import CREDENTIALS
from tests.support.clusters.scraped_metrics import metrics_of, scrape
from tests.support.waiting import WAIT_S, wait_until

PROMPT = "def add(a, b):"
NEW_TOKENS = 200


def config(name: str, **cluster: object) -> Config:
    return read_config({"cluster": {"name": name, "num_expert_actors": 2, **cluster}})


@pytest.fixture(scope="module")
def cluster(ray_session: object, model: str) -> Iterator[Cluster]:
    running = Cluster(f"test-{uuid.uuid4().hex[:8]}")
    running.start(config(running.name), model, credentials=CREDENTIALS)
    yield running
    pids = [e.pid for e in running.endpoints().values() if e is not None]
    running.stop()
    assert running.actors() == []
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@pytest.fixture(scope="module")
def reference(model: str) -> list[int]:
    """The greedy continuation by the whole model in one process."""
    read_model_config(model)  # registers the native family
    whole: Any = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([list(PROMPT.encode())])
    out = whole.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(ids))
    return [int(token) for token in out[0, len(PROMPT) :]]


def generate(cluster: Cluster) -> list[int]:
    with Client(cluster.router_address(), credentials=CREDENTIALS) as client:
        stream = client.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        stream.text()
        return stream.ids


def pid_of(cluster: Cluster, actor: str) -> int:
    endpoints = cluster.endpoints()[actor]
    assert endpoints is not None
    return endpoints.pid


def test_greedy_output_equals_the_model_in_one_process(cluster, reference) -> None:
    assert generate(cluster) == reference


def test_every_actor_serves_its_metrics(cluster) -> None:
    generate(cluster)
    shown = {}
    for name, endpoints in cluster.endpoints().items():
        shown[name] = metrics_of(endpoints.metrics_address, CREDENTIALS)
    assert set(shown) == {"controller", "router", "expert-0", "expert-1"}
    of = f'cluster="{cluster.name}"'
    model = f'model="{cluster.name}"'  # nobody named the model
    assert f"moecluster_placement_generation{{{of},{model}}}" in shown["controller"]
    assert f'moecluster_expert_tokens_total{{{of},expert="0",layer="0",{model}}}' in shown["router"]
    assert f'moecluster_dispatch_seconds_count{{{of},{model},transport="shm"}}' in shown["router"]
    assert f'moecluster_router_entropy{{{of},layer="0",{model}}}' in shown["router"]
    assert f'moecluster_actor_tokens_total{{actor="expert-1",{of},{model}}}' in shown["expert-1"]
    assert f'moecluster_replica_tokens_total{{actor="expert-1",{of},' in shown["expert-1"]
    assert f"moecluster_degraded{{{of},{model}}} 0.0" in shown["controller"]
    assert f'ray="{ray.__version__}"' in shown["router"] and "_created{" not in "".join(shown.values())


def test_the_controller_lists_every_process_for_prometheus(cluster) -> None:
    pages = {name: endpoints.metrics_address for name, endpoints in cluster.endpoints().items()}
    found = scrape(pages["controller"], CREDENTIALS, path="/sd").json()
    assert {group["labels"]["process"]: group["targets"] for group in found} == {n: [at] for n, at in pages.items()}


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_expert_actor_that_dies_or_hangs_while_generating_changes_nothing(cluster, reference, signal_number) -> None:
    before = pid_of(cluster, "expert-1")
    with Client(cluster.router_address(), credentials=CREDENTIALS) as client:
        stream = client.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        chunks = iter(stream)
        next(chunks)
        os.kill(before, signal_number)
        list(chunks)
    assert stream.ids == reference
    wait_until(
        lambda: all(
            a.phase is ActorPhase.SERVING
            for a in controller_status(cluster.controller_address(), credentials=CREDENTIALS).actors
        )
    )
    assert pid_of(cluster, "expert-1") != before
    assert not psutil.pid_exists(before)


def test_generation_goes_on_without_a_controller_and_a_new_one_takes_over(cluster, reference) -> None:
    term = controller_status(cluster.controller_address(), credentials=CREDENTIALS).term
    os.kill(pid_of(cluster, "controller"), signal.SIGKILL)
    assert generate(cluster) == reference
    with Client(cluster.router_address(), credentials=CREDENTIALS) as client:
        wait_until(lambda: client.status().placement.term == term + 1)
    assert {a.restarts for a in controller_status(cluster.controller_address(), credentials=CREDENTIALS).actors} == {0}
    assert generate(cluster) == reference


def test_many_requests_at_once_while_actors_die(cluster, reference) -> None:
    texts: list[list[int]] = []
    threads = [threading.Thread(target=lambda: texts.append(generate(cluster))) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    for actor in ("expert-0", "expert-1"):
        os.kill(pid_of(cluster, actor), signal.SIGKILL)
    for thread in threads:
        thread.join(WAIT_S)
    assert texts == [reference] * 3


def test_the_same_name_twice_is_refused(cluster, model) -> None:
    with pytest.raises(ResourceError, match=f"{cluster.name} is up already"):
        Cluster(cluster.name).start(config(cluster.name), model, credentials=CREDENTIALS)
    assert len(cluster.actors()) == 4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"cpus_per_expert_actor": 64}, r"CPUs are missing: 2 expert actors and the router need 128\.5 CPUs, free are"),
        ({"cpus_per_router": 64, "num_routers": 3}, r"2 expert actors and 3 routers need 192\.5 CPUs, free are"),
        ({"gpus_per_expert_actor": 1}, r"2 GPUs are missing"),
    ],
)
def test_too_few_resources_are_counted_and_nothing_is_left(ray_namespace, model, settings, complaint) -> None:
    cluster = Cluster(ray_namespace)
    with pytest.raises(ResourceError, match=complaint):
        cluster.start(config(ray_namespace, **settings), model, credentials=CREDENTIALS)
    assert cluster.actors() == []


def test_a_port_in_use_is_named_and_nothing_is_left(cluster, ray_namespace, model) -> None:
    taken = int(cluster.endpoints()["router"].metrics_address.rpartition(":")[2])
    other = Cluster(ray_namespace)
    with pytest.raises(ResourceError, match=f"port {taken} of 127.0.0.1 is in use"):
        other.start(config(ray_namespace, metrics_port=taken), model, credentials=CREDENTIALS)
    assert other.actors() == []


def test_a_placement_that_does_not_fit_the_model_is_refused(ray_namespace, model) -> None:
    settings = {"cluster": {"name": ray_namespace}, "controller": {"placement": {"expert-0": ["0/*"]}}}
    with pytest.raises(ConfigError, match="4 experts are on no actor"):
        Cluster(ray_namespace).start(read_config(settings), model, credentials=CREDENTIALS)
    assert Cluster(ray_namespace).actors() == []


def test_an_actor_that_cannot_start_says_why_and_nothing_is_left(ray_namespace, model, tmp_path) -> None:
    for file in Path(model).iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    cluster = Cluster(ray_namespace)
    with pytest.raises(ResourceError, match=r"router: .*has no tokenizer\.json"):
        cluster.start(config(ray_namespace), str(tmp_path), credentials=CREDENTIALS)
    assert cluster.actors() == []


def test_a_start_that_is_too_slow_leaves_nothing(ray_namespace, model) -> None:
    cluster = Cluster(ray_namespace)
    with pytest.raises(ResourceError, match=r"was not started within 0\.01 s"):
        cluster.start(config(ray_namespace, start_timeout_s=0.01), model, credentials=CREDENTIALS)
    assert cluster.actors() == []
    assert ray.is_initialized()

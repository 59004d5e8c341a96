"""Weight updates while routers are lost: no request mixes two weight versions."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from moecluster.client import Client
from moecluster.controller.operations.weight_rollout import UpdateSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.models.tokenizer.decoding import Detokenizer
from moecluster.models.tokenizer.detokenizer import StreamingDecoder
from tests.support.clusters.loopback_cluster import LoopbackCluster, LoopbackRouter
from tests.support.clusters.running_gateway import running_gateway
from tests.support.models.weight_versions import NEW_TOKENS, PROMPTS, done, requests_alone, save_version
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(180)

OLD_CALL_S = 0.04  # per layer with the old weights, so that their requests outlast the update
BEGUN_CALLS = 16  # after which requests that began together have some tokens
GRACE_S = 15.0  # a router restarts within it, even on a busy machine

Write = Callable[[str], str]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [save_version(root / name, seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture(scope="module")
def alone(versions: list[str]) -> list[dict[str, str]]:
    """Each version's own output, by prompt."""
    return [{prompt: shown(ids) for prompt, ids in requests_alone(directory).items()} for directory in versions]


@pytest.fixture
def cluster(versions: list[str]) -> Iterator[LoopbackCluster]:
    reconciler = ReconcilerSettings(policy="static", period_s=0.05, operation_timeout_s=10.0)
    update = UpdateSettings(router_grace_s=GRACE_S)
    with LoopbackCluster(versions[0], reconciler=reconciler, update=update) as running:
        yield running


@pytest.fixture
def second(cluster: LoopbackCluster) -> Iterator[LoopbackRouter]:
    router = cluster.add_router("router-1")
    yield router
    router.close()


@pytest.fixture
def old_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[RemoteExperts]:
    """Counts the calls with the old weights, which are slow, by router."""
    call, calls = RemoteExperts.__call__, Counter[RemoteExperts]()

    def slow_call(self: RemoteExperts, *args: Any, weight_version: int = 0, **kwargs: Any) -> Any:
        if weight_version == 1:
            calls[self] += 1
            time.sleep(OLD_CALL_S)
        return call(self, *args, weight_version=weight_version, **kwargs)

    monkeypatch.setattr(RemoteExperts, "__call__", slow_call)
    return calls


@pytest.fixture(params=["client", "gateway"])
def write(request: pytest.FixtureRequest, cluster: LoopbackCluster, second: LoopbackRouter) -> Iterator[Write]:
    """Generates a request over both routers, from any thread."""
    addresses = [cluster.router_server.address, second.server.address]
    if request.param == "client":
        with Client(addresses) as client:
            yield lambda prompt: client.generate(prompt, max_new_tokens=NEW_TOKENS).text()
        return
    with running_gateway(addresses) as gateway, gateway.openai() as client:
        yield lambda prompt: client.completions.create(
            model="model", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0.0
        ).choices[0].text  # fmt: skip


def shown(ids: Sequence[int]) -> str:
    decoder = StreamingDecoder(Detokenizer(build_byte_tokenizer()))
    return "".join(decoder.push(token) for token in ids) + decoder.finish()


def begin(write: Write, prompts: Sequence[str], texts: list[tuple[str, str]]) -> list[threading.Thread]:
    """Starts concurrent requests, each in a thread; a failed one adds nothing to texts."""
    threads = [threading.Thread(target=lambda p=prompt: texts.append((p, write(p)))) for prompt in prompts]
    for thread in threads:
        thread.start()
    return threads


def test_requests_of_a_router_that_is_killed_amid_an_update_are_those_of_one_model(
    cluster: LoopbackCluster,
    second: LoopbackRouter,
    versions: list[str],
    alone: list[dict[str, str]],
    old_calls: Counter[RemoteExperts],
    write: Write,
) -> None:
    wait_until(lambda: second.router.state().weight_version == 1)
    old_requests: list[tuple[str, str]] = []
    new_requests: list[tuple[str, str]] = []
    begun = begin(write, (*PROMPTS, PROMPTS[0]), old_requests)
    wait_until(lambda: cluster.router.state().running == second.router.state().running == 2, "texts at both")
    wait_until(lambda: min(old_calls[cluster.remote], old_calls[second.remote]) >= BEGUN_CALLS, "tokens at both")
    operation = cluster.controller.update(versions[1])
    routers = (cluster.router, second.router)
    wait_until(lambda: {router.state().weight_version for router in routers} == {2}, "version 2")
    assert second.router.state().oldest_weight_version == 1 and not old_requests, "texts of the old version are written"
    begun += begin(write, PROMPTS, new_requests)
    second.close()
    for thread in begun:
        thread.join(60.0)
    assert len(old_requests) == 4 and all(text == alone[0][prompt] for prompt, text in old_requests)
    assert len(new_requests) == 3 and all(text == alone[1][prompt] for prompt, text in new_requests)
    done(cluster, operation)


@pytest.mark.parametrize("also", ["nobody", "controller"])
def test_the_old_version_stays_for_the_requests_of_a_router_that_came_back_without_them(
    cluster: LoopbackCluster, second: LoopbackRouter, versions: list[str], also: str
) -> None:
    wait_until(lambda: second.router.state().weight_version == 1)
    second.router.models.use()  # a request whose client is slow to fail over
    operation = cluster.controller.update(versions[1])
    wait_until(lambda: cluster.router.state().weight_version == 2, "version 2")
    second.close()
    if also == "controller":  # which knew of these requests
        cluster.replace_controller()
    again = cluster.add_router("router-1")
    try:
        wait_until(lambda: again.router.state().weight_version == 2, "router-1 is there again")
        with cluster.router.models.use(version=1):  # the request continues
            time.sleep(GRACE_S + cluster.controller.lease_s)
            wait_until(
                lambda: "still run on router" in cluster.controller.operation(operation.id).detail,
                "the old version is kept for it",
            )
            assert cluster.controller.current(0.0).old_weight_version
        done(cluster, operation)
    finally:
        again.close()

"""Routers are added under load and removed afterwards, in a real cluster: no request fails or changes its output."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.names import is_router
from moecluster.client import Client
from moecluster.errors import MoeClusterError
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.types import OperationKind, OperationPhase, RouterState
from tests.support.clusters.ray_cluster import CREDENTIALS, RayCluster, wait_for_result
from tests.support.clusters.ray_session import RaySession
from tests.support.soak.generation_load import PROMPTS, save_decided_model

NEW_TOKENS = 100
NUM_CLIENTS = 3


@pytest.fixture(scope="module")
def cluster(ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    directory: Path = tmp_path_factory.mktemp("model")
    tables = {
        "cluster": {"num_expert_actors": 1},
        "controller": {"period_s": 0.2, "lease_s": 2.0},
        "serve": {"max_routers": 2, "target_requests": 1.0, "upscale_delay_s": 0.5, "downscale_delay_s": 2.0},
    }
    with RayCluster(save_decided_model(directory), tables) as running:
        yield running


def routers(cluster: RayCluster) -> dict[str, RouterState]:
    """The serving routers that the controller knows."""
    status = cluster.status()
    return {s.router: s for s in status.router_states if s.address} if status is not None else {}


class Gateway:
    """NUM_CLIENTS threads that send one request after another, each to the staying router with the fewest requests."""

    def __init__(self, cluster: RayCluster) -> None:
        self.texts: list[tuple[str, str, str]] = []  # router, prompt, text
        self.failures: list[str] = []
        self._cluster = cluster
        self._sent: dict[str, int] = {}  # router -> running requests
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._states: dict[str, RouterState] = {}
        self._threads = [threading.Thread(target=self._look)]
        self._threads += [threading.Thread(target=self._write, args=(i,)) for i in range(NUM_CLIENTS)]

    def __enter__(self) -> "Gateway":
        self._states = wait_for_result(lambda: routers(self._cluster), "a router serves")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60.0)

    def _look(self) -> None:
        while not self._over.wait(0.2):
            self._states = routers(self._cluster) or self._states

    def _write(self, number: int) -> None:
        turn = number
        while not self._over.is_set():
            prompt, turn = PROMPTS[turn % len(PROMPTS)], turn + 1
            with self._lock:
                staying = {name: state.address for name, state in self._states.items() if not state.leaving}
                name = min(staying, key=lambda router: (self._sent.get(router, 0), router))
                self._sent[name] = self._sent.get(name, 0) + 1
            try:
                with Client(staying[name], credentials=CREDENTIALS) as client:
                    text = client.generate(prompt, max_new_tokens=NEW_TOKENS).text()
                self.texts.append((name, prompt, text))
            except MoeClusterError as exc:
                self.failures.append(f"{name}: {exc}")
            with self._lock:
                self._sent[name] -= 1


def test_under_load_a_second_router_starts_and_when_it_is_over_it_is_drained_and_ended(cluster: RayCluster) -> None:
    with cluster.client() as client:
        alone = {prompt: client.generate(prompt, max_new_tokens=NEW_TOKENS).text() for prompt in PROMPTS}
    with Gateway(cluster) as gateway:
        began_s = time.monotonic()
        wait_for_result(lambda: set(routers(cluster)) == {"router", "router-1"}, "a second router serves")
        print(f"the second router served after {time.monotonic() - began_s:.1f} s")
        wait_for_result(lambda: sum(name == "router-1" for name, _, _ in gateway.texts) >= 3, "it writes texts")
        addresses = {state.address for state in routers(cluster).values()}
        assert set(cluster.driver.router_addresses()) == addresses
    wait_for_result(lambda: "router-1" not in cluster.driver.actors(), "it is ended")
    assert not gateway.failures and len(gateway.texts) > NUM_CLIENTS
    assert all(text == alone[prompt] for _, prompt, text in gateway.texts)
    wait_for_result(lambda: set(routers(cluster)) == {"router"}, "it is forgotten")
    with ControllerCalls(cluster.driver.controller_address(), credentials=CREDENTIALS) as calls:
        wait_for_result(lambda: all(o.phase.ended for o in calls.operations()), "the operations end")
        changes = [o for o in calls.operations() if o.kind is OperationKind.SCALE_ROUTERS]
    assert [(o.arguments, o.phase) for o in changes] == [(("1",), OperationPhase.DONE), (("2",), OperationPhase.DONE)]
    assert "a router has" in changes[0].reason and "a router has" in changes[1].reason


def test_a_controller_that_is_started_again_finds_the_routers_and_goes_on(cluster: RayCluster) -> None:
    """The request running on the leaving router completes."""
    with ControllerCalls(cluster.driver.controller_address(), credentials=CREDENTIALS) as calls:
        calls.scale_routers(2, operation_id="grow")
        wait_for_result(lambda: calls.operation("grow").phase is OperationPhase.DONE, "the second router serves")
    with Client(routers(cluster)["router-1"].address, credentials=CREDENTIALS) as client:
        assert client.status().controller == cluster.driver.controller_address()
        chunks = iter(client.generate(PROMPTS[0], max_new_tokens=200))
        begun = next(chunks)
        with ControllerCalls(cluster.driver.controller_address(), credentials=CREDENTIALS) as calls:
            calls.scale_routers(1, operation_id="shrink")
        wait_for_result(lambda: routers(cluster)["router-1"].leaving, "it leaves")
        cluster.kill("controller")
        whole = begun.text + "".join(chunk.text for chunk in chunks)
    with cluster.client() as client:
        assert client.generate(PROMPTS[0], max_new_tokens=200).text() == whole
    wait_for_result(lambda: [n for n in cluster.driver.actors() if is_router(n)] == ["router"], "it is ended")
    wait_for_result(lambda: set(routers(cluster)) == {"router"}, "the successor knows the first one")

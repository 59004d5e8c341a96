"""Router discovery through every source, and the gateway's report of its cluster's problems."""

import dataclasses
import time
from typing import Any, Self

import httpx
import openai
import pytest

from moecluster.errors import (
    ClusterEnded,
    Unavailable,
)
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource
from moecluster.rpc.controller.server import serve_controller
from moecluster.types import ActorPhase, ActorState, ControllerStatus, RouterState
from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.clusters.streamed_requests import NOBODY, TEXT, ask, assert_whole
from tests.support.fakes.fake_controller import FakeController
from tests.support.waiting import wait_until


class Listing(FakeController):
    """A controller that lists routers."""

    def __init__(self, *states: RouterState) -> None:
        super().__init__()
        self.listed = states
        self.server = serve_controller(self, credentials=None)

    def status(self) -> ControllerStatus:
        return dataclasses.replace(super().status(), router_states=self.listed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(0.0)
        self.close()


def test_routers_are_found_through_the_controller(first, second) -> None:
    states = [RouterState(router=router.name, address=router.address) for router in (first, second)]
    with Listing(*states) as controller:
        source = ModelSource(name="model", seeds=ClusterAddresses(controller=controller.server.address))
        with running_gateway(source) as gateway:
            wait_until(lambda: gateway.routers.answering == 2)
            assert_whole(ask(gateway), first, second)
            controller.listed = (states[0], dataclasses.replace(states[1], leaving=True))
            wait_until(lambda: [r.address for r in gateway.routers.candidates() if r.leaving] == [second.address])
            before = len(second.requests)
            for seed in range(4):
                ask(gateway, seed=seed)
            assert len(second.requests) == before


class Ailing(Listing):
    """A controller whose actors' state is set by the test."""

    actors: tuple[ActorState, ...] = ()
    lost_experts = 0

    def status(self) -> ControllerStatus:
        return dataclasses.replace(super().status(), actors=self.actors, lost_experts=self.lost_experts)


def test_health_says_what_is_wrong_while_requests_are_still_written(first) -> None:
    def health(gateway: RunningGateway) -> tuple[int, Any]:
        answer = httpx.get(f"{gateway.url}/health")
        return answer.status_code, answer.json()

    with Ailing(RouterState(router="first", address=first.address)) as controller:
        source = ModelSource(name="model", seeds=ClusterAddresses(controller=controller.server.address))
        with running_gateway(source) as gateway:
            wait_until(lambda: health(gateway) == (200, {"status": "ready", "reasons": [], "routers": {"model": 1}}))
            lost = ActorState(
                actor="expert-1", address="", incarnation="", phase=ActorPhase.LOADING, experts=0, restarts=1
            )
            controller.actors, controller.lost_experts = (lost,), 4
            wait_until(lambda: health(gateway)[1]["status"] == "degraded")
            reasons = ["model: expert-1 is loading", "model: 4 experts have no serving replica at the moment"]
            assert health(gateway) == (200, {"status": "degraded", "reasons": reasons, "routers": {"model": 1}})
            controller.actors = (dataclasses.replace(lost, problem="/private/model: no such directory"),)
            wait_until(lambda: "checkpoint directory is gone" in str(health(gateway)))
            assert "/private" not in str(health(gateway))
            controller.actors, controller.lost_experts = (), 0
            wait_until(lambda: health(gateway)[1]["status"] == "ready")
            controller.server.stop(0.0)
            wait_until(lambda: "no controller answers" in str(health(gateway)))
            assert health(gateway)[0] == 200 and health(gateway)[1]["status"] == "degraded"


def test_a_cluster_that_has_ended_is_not_waited_for_until_it_is_there_again(first) -> None:
    ended = [True]

    def rediscover() -> ClusterAddresses:
        if ended[0]:
            raise ClusterEnded("Ray's raylet has ended")
        return ClusterAddresses(routers=(first.address,))

    source = ModelSource(name="model", seeds=ClusterAddresses(routers=(NOBODY,)), rediscover=rediscover)
    with running_gateway(source, router_wait_timeout_s=1000.0) as gateway:
        with (
            gateway.openai() as client,
            pytest.raises(openai.InternalServerError, match="its cluster has ended") as output,
        ):
            client.completions.create(**TEXT)
        assert output.value.status_code == 503
        answer = httpx.get(f"{gateway.url}/health")
        assert answer.status_code == 503 and answer.json() == {
            "status": "not ready",
            "reasons": ["model: Ray's raylet has ended"],
            "routers": {"model": 0},
        }
        ended[0] = False
        wait_until(lambda: gateway.routers.answering == 1)
        assert_whole(ask(gateway), first)


def test_a_controller_elsewhere_is_found_through_the_routers(first, second) -> None:
    with Listing(RouterState(router="second", address=second.address)) as controller:
        first.controller = controller.server.address
        source = ModelSource(name="model", seeds=ClusterAddresses(routers=(first.address,), controller=NOBODY))
        with running_gateway(source) as gateway:
            wait_until(lambda: gateway.routers.answering == 2)


def test_when_all_are_lost_others_are_asked_where_the_cluster_is(second) -> None:
    asked: list[float] = []

    def rediscover() -> ClusterAddresses:
        asked.append(time.monotonic())
        if len(asked) == 1:
            raise Unavailable("nobody knows")
        return ClusterAddresses(routers=(second.address,))

    source = ModelSource(name="model", seeds=ClusterAddresses(routers=(NOBODY,)), rediscover=rediscover)
    with running_gateway(source, router_wait_timeout_s=20.0) as gateway:
        assert_whole(ask(gateway), second)
    assert len(asked) == 2

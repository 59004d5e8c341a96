"""Routers on nodes that Ray is about to remove, and what no answer of Ray means."""

import math
import time
from collections.abc import Iterator

import pytest

from moecluster.errors import Unavailable
from moecluster.types import OperationPhase, PlacementNumber, RouterState
from tests.support.fakes.fake_routers import IDLE_S, FakeRouters, Make, leaving, router_sizings, stays
from tests.support.waiting import wait_until


@pytest.fixture
def make() -> Iterator[Make]:
    with router_sizings() as start:
        yield start


@pytest.mark.parametrize("answer", [(), Unavailable("Ray is away")])
def test_without_an_answer_or_with_an_empty_one_nothing_is_forgotten_started_or_ended(
    make, answer, monkeypatch
) -> None:
    routers = FakeRouters("router", "router-1")
    routers.tell("router-1", running=1)
    sizing = make(routers)
    operation = sizing.request(1)
    wait_until(lambda: leaving(sizing) == ["router-1"])
    if isinstance(answer, Unavailable):
        routers.silence = answer
    else:
        monkeypatch.setattr(routers, "existing_routers", lambda: answer)
    routers.tell("router-1")
    assert stays(lambda: leaving(sizing) == ["router-1"])
    routers.now_s += 2 * IDLE_S
    assert stays(lambda: list(routers.there) == ["router", "router-1"] and not routers.phase(operation).ended)
    routers.silence = None
    monkeypatch.undo()
    time.sleep(0.05)
    routers.now_s += IDLE_S
    wait_until(lambda: routers.phase(operation) is OperationPhase.DONE)
    assert list(routers.there) == ["router"]


def test_a_router_on_a_node_that_is_removed_leaves_once_another_one_serves(make) -> None:
    routers = FakeRouters("router", "router-1")
    routers.nodes = {"router": "head", "router-1": "spot"}
    sizing = make(routers, max_routers=2)
    routers.draining = {"spot": 30.0}
    wait_until(lambda: "router-2" in routers.there, "one more than wanted, and than the limit, for the change")
    operation = routers.log.newest(1)[0]
    assert operation.reason == "Ray is about to remove the node of router-1" and operation.arguments == ("2",)
    wait_until(lambda: "router-1 stays until another one serves" in routers.detail(operation))
    assert stays(lambda: leaving(sizing) == [])
    routers.tell("router-2")
    wait_until(lambda: leaving(sizing) == ["router-1"])
    time.sleep(0.05)
    routers.now_s += IDLE_S
    wait_until(lambda: routers.phase(operation) is OperationPhase.DONE)
    assert list(routers.there) == ["router", "router-2"]
    assert stays(lambda: len(routers.log.newest()) == 1), "once"


def test_the_first_router_leaves_a_removed_node_too_and_two_are_replaced_one_by_one(make) -> None:
    routers = FakeRouters("router", "router-1")
    routers.nodes = dict.fromkeys(routers.there, "spot")
    sizing = make(routers, max_routers=2)
    routers.draining = {"spot": 30.0}
    wait_until(lambda: "router-2" in routers.there)
    assert stays(lambda: len(routers.there) == 3)
    routers.tell("router-2")
    wait_until(lambda: leaving(sizing) == ["router-1"])
    wait_until(lambda: "router-3" in routers.there)
    routers.tell("router-3")
    wait_until(lambda: leaving(sizing) == ["router", "router-1"])
    time.sleep(0.05)
    routers.now_s += IDLE_S
    wait_until(lambda: list(routers.there) == ["router-2", "router-3"])


def test_a_router_that_trains_stays_on_its_node_while_it_trains(make) -> None:
    routers = FakeRouters("router", "router-1")
    routers.nodes = {"router": "spot"}
    state = RouterState(router="router", address="127.0.0.1:5000")
    routers.leases.renew("router", PlacementNumber(1, 1), state=state, hold=True)
    sizing = make(routers)
    routers.draining = {"spot": 30.0}
    wait_until(lambda: "router-2" in routers.there)
    routers.tell("router-2")
    assert stays(lambda: leaving(sizing) == [])
    routers.tell("router")
    wait_until(lambda: leaving(sizing) == ["router"])


def test_a_router_that_cannot_be_replaced_stays_and_is_not_tried_again(make) -> None:
    routers = FakeRouters("router")
    routers.nodes = {"router": "spot"}
    sizing = make(routers)
    routers.draining = {"spot": math.inf}
    wait_until(lambda: "router-1" in routers.there)
    operation = routers.log.newest(1)[0]
    routers.now_s += 61.0
    wait_until(lambda: routers.phase(operation) is OperationPhase.FAILED)
    assert list(routers.there) == ["router"] and leaving(sizing) == []
    assert stays(lambda: len(routers.log.newest()) == 1)


def test_one_that_leaves_is_not_taken_back_to_a_node_that_is_removed(make) -> None:
    routers = FakeRouters("router", "router-1")
    routers.nodes = {"router-1": "spot"}
    routers.tell("router-1", running=1)
    sizing = make(routers)
    sizing.request(1)
    wait_until(lambda: leaving(sizing) == ["router-1"])
    routers.draining = {"spot": 30.0}
    time.sleep(0.05)
    sizing.request(2)
    wait_until(lambda: "router-2" in routers.there)
    assert leaving(sizing) == ["router-1"]

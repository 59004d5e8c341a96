"""Router scaling over a supervisor in this process: started routers serve when the test says so."""

import time
from collections.abc import Iterator

import pytest

from moecluster.errors import ResourceError, Unavailable
from moecluster.placement.scaling import RouterSizeSettings
from moecluster.types import Operation, OperationKind, OperationPhase, PlacementNumber
from tests.support.fakes.fake_routers import IDLE_S, LEASE_S, FakeRouters, Make, leaving, router_sizings, stays
from tests.support.waiting import wait_until


@pytest.fixture
def make() -> Iterator[Make]:
    with router_sizings() as start:
        yield start


def test_an_order_for_more_starts_the_lowest_names_with_what_is_served_and_waits_until_they_serve(make) -> None:
    routers = FakeRouters("router", "router-2")
    sizing = make(routers)
    operation = sizing.request(4, operation_id="grow")
    wait_until(lambda: len(routers.there) == 4)
    assert routers.there == {"router": "/first", "router-2": "/first", "router-1": "/newest", "router-3": "/newest"}
    wait_until(lambda: routers.detail(operation) == "waits: router-1 does not serve yet; router-3 does not serve yet")
    assert routers.phase(operation) is OperationPhase.PREPARING
    routers.tell("router-1")
    routers.leases.renew("router-3", PlacementNumber(1, 1))  # it has a lease before it listens
    assert stays(lambda: not routers.phase(operation).ended)
    routers.tell("router-3")
    wait_until(lambda: routers.phase(operation) is OperationPhase.DONE)
    assert sizing.request(4, operation_id="grow").id == "grow" and len(routers.log.newest()) == 1


def test_the_routers_of_the_highest_numbers_leave_and_end_when_they_have_no_request(make) -> None:
    routers = FakeRouters("router", "router-1", "router-2")
    routers.tell("router-2", running=2)
    routers.tell("router-1", waiting=1)
    sizing = make(routers)
    operation = sizing.request(1)
    wait_until(lambda: leaving(sizing) == ["router-1", "router-2"])
    text = "waits: router-1 leaves with 1 request to finish; router-2 leaves with 2 requests to finish"
    wait_until(lambda: routers.detail(operation) == text)
    assert routers.phase(operation) is OperationPhase.COMMITTING
    routers.now_s += 2 * LEASE_S
    assert stays(lambda: not routers.ended)
    routers.tell("router-1")
    wait_until(lambda: "router-1 leaves;" in routers.detail(operation))
    assert stays(lambda: not routers.ended), "gateways must see first that it leaves"
    routers.now_s += IDLE_S
    wait_until(lambda: routers.ended == ["router-1"])
    routers.tell("router-2")
    assert stays(lambda: len(routers.ended) == 1)
    routers.now_s += IDLE_S
    wait_until(lambda: routers.phase(operation) is OperationPhase.DONE)
    assert list(routers.there) == ["router"] == [state.router for state in sizing.states()]


def test_a_request_that_still_comes_is_waited_for_too(make) -> None:
    routers = FakeRouters("router", "router-1")
    sizing = make(routers)
    sizing.request(1)
    wait_until(lambda: leaving(sizing) == ["router-1"])
    routers.tell("router-1", running=1)
    assert stays(lambda: not routers.ended)
    routers.now_s += IDLE_S
    assert stays(lambda: not routers.ended)
    routers.tell("router-1")
    assert stays(lambda: not routers.ended), "without a text only since now"
    routers.now_s += IDLE_S
    wait_until(lambda: routers.ended == ["router-1"])


def test_a_router_whose_requests_do_not_end_is_ended_after_the_timeout(make) -> None:
    routers = FakeRouters("router", "router-1")
    routers.tell("router-1", running=1)
    sizing = make(routers)
    operation = sizing.request(1)
    wait_until(lambda: leaving(sizing) == ["router-1"])
    routers.now_s += 299.0
    assert stays(lambda: not routers.ended)
    routers.now_s += 1.0
    wait_until(lambda: routers.phase(operation) is OperationPhase.DONE)
    assert routers.ended == ["router-1"]


def test_one_that_leaves_is_taken_back_instead_of_starting_another(make) -> None:
    routers = FakeRouters("router", "router-1", "router-2")
    for name in routers.there:
        routers.tell(name, running=1)
    sizing = make(routers)
    fewer = sizing.request(1)
    wait_until(lambda: leaving(sizing) == ["router-1", "router-2"])
    more = sizing.request(2)
    wait_until(lambda: leaving(sizing) == ["router-2"])
    assert routers.phase(fewer) is OperationPhase.FAILED
    assert routers.detail(fewer) == f"superseded by {more.id}"
    most = sizing.request(4)
    wait_until(lambda: len(routers.there) == 4)
    assert leaving(sizing) == [] and routers.ended == []
    routers.tell("router-3")
    wait_until(lambda: routers.phase(most) is OperationPhase.DONE)


def test_a_successor_goes_on_and_ends_nobody_before_it_has_heard_of_them(make) -> None:
    routers = FakeRouters("router", "router-1", "router-2")
    sizing = make(routers)
    routers.tell("router-2", running=1)
    operation = sizing.request(2)
    wait_until(lambda: leaving(sizing) == ["router-2"])
    sizing.close()
    left = routers.log.for_successor(10)
    routers.replace_controller()
    routers.log.take_over(left)
    second = make(routers)
    assert stays(lambda: not routers.ended)
    routers.now_s += LEASE_S / 2
    assert stays(lambda: not routers.ended)
    for name, running in (("router", 0), ("router-1", 0), ("router-2", 1)):
        routers.tell(name, running=running)
    wait_until(lambda: leaving(second) == ["router-2"])
    routers.now_s += 2 * LEASE_S
    assert stays(lambda: not routers.ended)
    routers.tell("router-2")
    wait_until(lambda: "router-2 leaves" in routers.detail(operation))
    assert stays(lambda: not routers.ended)
    routers.now_s += IDLE_S
    wait_until(lambda: routers.phase(operation) is OperationPhase.DONE)
    assert routers.ended == ["router-2"]


def test_one_that_leaves_and_is_not_heard_of_is_gone(make) -> None:
    routers = FakeRouters("router", "router-1")
    routers.leases.drop("router-1")
    sizing = make(routers)
    operation = sizing.request(1)
    wait_until(lambda: routers.detail(operation) == "waits: router-1 does not report")
    routers.now_s += LEASE_S - 1.0
    assert stays(lambda: not routers.ended)
    routers.now_s += 1.0
    assert stays(lambda: not routers.ended)
    routers.now_s += IDLE_S
    wait_until(lambda: routers.ended == ["router-1"])


def test_routers_that_never_come_are_given_up_and_others_are_left_alone(make) -> None:
    routers = FakeRouters("router", "router-1")
    routers.leases.drop("router-1")  # Ray restarts it
    sizing = make(routers)
    operation = sizing.request(3)
    wait_until(lambda: "router-2" in routers.there)
    routers.now_s += 61.0
    wait_until(lambda: routers.phase(operation) is OperationPhase.FAILED)
    assert "router-2 does not serve yet, after 60 s; is the Ray cluster short" in routers.detail(operation)
    assert routers.ended == ["router-2"] and list(routers.there) == ["router", "router-1"]


@pytest.mark.parametrize("refusal", [Unavailable("Ray is away"), RuntimeError("a bug")])
def test_an_error_ends_the_order_at_last_and_later_ones_are_carried_out(make, refusal) -> None:
    routers = FakeRouters("router")
    routers.refusal = refusal
    sizing = make(routers)
    operation = sizing.request(2)
    if isinstance(refusal, Unavailable):
        wait_until(lambda: routers.detail(operation) == "waits: Ray is away")
        routers.now_s += 61.0
    wait_until(lambda: routers.phase(operation) is OperationPhase.FAILED)
    routers.refusal = None
    again = sizing.request(2)
    wait_until(lambda: "router-1" in routers.there)
    routers.tell("router-1")
    wait_until(lambda: routers.phase(again) is OperationPhase.DONE)


@pytest.mark.parametrize("wanted", [0, 5, -1])
def test_orders_beyond_the_limits_are_refused(make, wanted) -> None:
    sizing = make(FakeRouters("router"))
    with pytest.raises(ResourceError, match=rf"{wanted} routers are beyond the limits, which are 1 to 4 \(serve"):
        sizing.request(wanted)


SIZE = RouterSizeSettings(
    min_routers=1, max_routers=3, target_requests=4.0, upscale_delay_s=5.0, downscale_delay_s=50.0
)


def test_requests_bring_routers_and_their_end_ends_them_with_the_reason_in_the_log(make) -> None:
    routers = FakeRouters("router")
    routers.tell("router", running=4, waiting=8)
    routers.tell("a test's own", running=99)  # it has a lease but is not a router of the cluster
    make(routers, size=SIZE)
    routers.now_s += LEASE_S - 1.0
    assert stays(lambda: not routers.log.newest()), "routers must be heard first"
    routers.now_s += 1.0
    time.sleep(0.05)
    routers.now_s += 5.0
    wait_until(lambda: len(routers.there) == 3)
    operation = routers.log.newest(1)[0]
    assert (operation.kind, operation.arguments) == (OperationKind.SCALE_ROUTERS, ("3",))
    assert "8.0 of which wait" in operation.reason
    for name in routers.there:
        routers.tell(name)
    wait_until(lambda: routers.phase(operation) is OperationPhase.DONE)
    time.sleep(0.05)
    routers.now_s += 50.0
    wait_until(lambda: len(routers.log.newest()) == 2)
    time.sleep(0.05)
    routers.now_s += IDLE_S
    wait_until(lambda: list(routers.there) == ["router"])


def test_under_new_load_those_that_leave_by_decision_are_taken_back_and_by_order_not(make) -> None:
    routers = FakeRouters("router", "router-1")
    routers.tell("router-1", running=1)
    sizing = make(routers, size=SIZE)
    routers.now_s += LEASE_S
    time.sleep(0.05)
    routers.now_s += 50.0
    wait_until(lambda: leaving(sizing) == ["router-1"])
    routers.tell("router", running=8)
    time.sleep(0.05)
    routers.now_s += 5.0
    wait_until(lambda: leaving(sizing) == [])
    assert list(routers.there) == ["router", "router-1"]
    ordered = sizing.request(1)
    wait_until(lambda: leaving(sizing) == ["router-1"])
    time.sleep(0.05)
    routers.now_s += 50.0
    assert stays(lambda: leaving(sizing) == ["router-1"] and not routers.phase(ordered).ended)


def test_no_decision_takes_the_place_of_an_order_that_waits(make, monkeypatch) -> None:
    routers = FakeRouters("router")
    routers.tell("router", running=4, waiting=8)
    sizing = make(routers, size=SIZE)
    routers.now_s += LEASE_S
    time.sleep(0.05)
    existing_routers = routers.existing_routers
    ordered: list[Operation] = []

    def order_first() -> tuple[str, ...]:
        if not ordered and routers.now_s > 112.0:  # in the round that would decide
            ordered.append(sizing.request(2))
        return existing_routers()

    monkeypatch.setattr(routers, "existing_routers", order_first)
    routers.now_s += 5.0
    wait_until(lambda: "router-1" in routers.there)
    routers.tell("router-1")
    wait_until(lambda: routers.phase(ordered[0]) is OperationPhase.DONE)


@pytest.mark.parametrize("silent", [["router-1"], ["router", "router-1"]])
def test_routers_that_do_not_report_are_not_idle(make, silent) -> None:
    routers = FakeRouters("router", "router-1")
    for name in silent:
        routers.leases.drop(name)
    make(routers, size=SIZE)
    routers.now_s += LEASE_S
    time.sleep(0.05)
    routers.now_s += 50.0
    assert stays(lambda: not routers.log.newest())
    for name in silent:
        routers.tell(name)
    time.sleep(0.05)
    routers.now_s += 50.0
    wait_until(lambda: bool(routers.log.newest()))

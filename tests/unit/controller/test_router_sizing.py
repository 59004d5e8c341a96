"""Router scaling over a supervisor in this process: started routers serve when the test says so."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest

from moecluster.controller.context import new_context
from moecluster.controller.operations.routers import RouterSizing, RouterSizingSettings
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.errors import MoeClusterError, ResourceError, Unavailable
from moecluster.metrics import Metrics
from moecluster.placement.scaling import RouterSizeSettings
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import Operation, OperationKind, OperationPhase, PlacementNumber, RouterState, WeightVersion
from tests.support.waiting import wait_until

LEASE_S = 10.0
IDLE_S = 3.0


class Routers:
    """A RouterSupervisor, and everything else that a RouterSizing uses."""

    def __init__(self, *names: str) -> None:
        self.now_s = 100.0
        self.there: dict[str, str] = dict.fromkeys(names, "/first")  # router -> checkpoint that it was started with
        self.ended: list[str] = []
        self.refusal: Exception | None = None
        self.silence: MoeClusterError | None = None  # raised instead of an answer about the cluster
        self.draining: dict[str, float] = {}  # node -> in how many seconds it is removed
        self.nodes: dict[str, str] = {}  # router -> its node
        self.replace_controller()
        for name in names:
            self.tell(name)

    def replace_controller(self) -> None:
        """Replaces the controller by one that has received no reports yet and serves /newest."""
        self.context = new_context(
            {0: 2}, lease_s=1e6, board=PlacementBoard(), metrics=Metrics(model="tiny"), clock=lambda: self.now_s
        )
        self.leases, self.log = self.context.leases, self.context.operations
        versions = WeightVersions.only(WeightVersion(version=1, checkpoint="/newest"))
        self.context.state.begin(term=1, generation=0, versions=versions, actors=(), replicas=())

    def existing_routers(self) -> tuple[str, ...]:
        self._answer()
        return tuple(self.there)

    def draining_nodes(self) -> dict[str, float]:
        self._answer()
        return self.draining

    def routers_on(self, nodes: Collection[str]) -> frozenset[str]:
        self._answer()
        return frozenset(router for router in self.there if self.nodes.get(router) in nodes)

    def _answer(self) -> None:
        if self.silence is not None:
            raise self.silence

    def create_router(self, router: str, checkpoint: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.there.setdefault(router, checkpoint)

    def remove_router(self, router: str) -> None:
        if self.there.pop(router, None) is not None:
            self.ended.append(router)

    def tell(self, router: str, running: int = 0, waiting: int = 0) -> None:
        """Reports that a router serves, with these numbers of requests."""
        state = RouterState(router=router, address="127.0.0.1:5000", running=running, waiting=waiting)
        self.leases.renew(router, PlacementNumber(1, 1), state=state)

    def phase(self, operation: Operation) -> OperationPhase:
        return self.log.get(operation.id).phase

    def detail(self, operation: Operation) -> str:
        return self.log.get(operation.id).detail


Make = Callable[..., RouterSizing]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes a RouterSizing over some routers, and closes it after the test."""
    made: list[RouterSizing] = []

    def start(routers: Routers, **settings: Any) -> RouterSizing:
        sizing = RouterSizing(
            routers.context,
            RouterSizingSettings(
                period_s=0.01,
                lease_s=LEASE_S,
                start_timeout_s=60.0,
                drain_timeout_s=300.0,
                idle_s=IDLE_S,
                **{"max_routers": 4, **settings},
            ),
            supervisor=routers,
        )
        sizing.start()
        made.append(sizing)
        return sizing

    yield start
    for sizing in made:
        sizing.close()


def stays(condition: Callable[[], bool]) -> bool:
    """Whether a condition stays true over many checks."""
    until_s = time.monotonic() + 0.15
    while time.monotonic() < until_s:
        if not condition():
            return False
        time.sleep(0.005)
    return True


def leaving(sizing: RouterSizing) -> list[str]:
    return [state.router for state in sizing.states() if state.leaving]


def test_an_order_for_more_starts_the_lowest_names_with_what_is_served_and_waits_until_they_serve(make) -> None:
    routers = Routers("router", "router-2")
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
    routers = Routers("router", "router-1", "router-2")
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
    routers = Routers("router", "router-1")
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
    routers = Routers("router", "router-1")
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
    routers = Routers("router", "router-1", "router-2")
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
    routers = Routers("router", "router-1", "router-2")
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
    routers = Routers("router", "router-1")
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
    routers = Routers("router", "router-1")
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
    routers = Routers("router")
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
    sizing = make(Routers("router"))
    with pytest.raises(ResourceError, match=rf"{wanted} routers are beyond the limits, which are 1 to 4 \(serve"):
        sizing.request(wanted)


@pytest.mark.parametrize("answer", [(), Unavailable("Ray is away")])
def test_without_an_answer_or_with_an_empty_one_nothing_is_forgotten_started_or_ended(
    make, answer, monkeypatch
) -> None:
    routers = Routers("router", "router-1")
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
    routers = Routers("router", "router-1")
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
    routers = Routers("router", "router-1")
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
    routers = Routers("router", "router-1")
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
    routers = Routers("router")
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
    routers = Routers("router", "router-1")
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


SIZE = RouterSizeSettings(
    min_routers=1, max_routers=3, target_requests=4.0, upscale_delay_s=5.0, downscale_delay_s=50.0
)


def test_requests_bring_routers_and_their_end_ends_them_with_the_reason_in_the_log(make) -> None:
    routers = Routers("router")
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
    routers = Routers("router", "router-1")
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
    routers = Routers("router")
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
    routers = Routers("router", "router-1")
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

"""Routers and a controller over loopback: their reported states, and how the controller starts and stops them."""

import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator

import pytest

from moecluster.controller.operations.routers import RouterSizingSettings
from moecluster.errors import UserError
from moecluster.placement.scaling import RouterSizeSettings
from moecluster.rpc.controller.client import ControllerCalls, controller_status
from moecluster.rpc.controller.subscription import ControllerClient
from moecluster.types import OperationKind, OperationPhase, RouterState
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.waiting import wait_until

SETTINGS = RouterSizingSettings(
    max_routers=3,
    size=RouterSizeSettings(
        min_routers=1, max_routers=3, target_requests=2.0, upscale_delay_s=0.2, downscale_delay_s=0.5
    ),
    period_s=0.05,
    lease_s=0.6,
    idle_s=0.3,
)


class FakeFleet:
    """A RouterSupervisor whose routers are only what a controller sees of one: a lease with a state."""

    def __init__(self) -> None:
        self.where: Callable[[], str] = lambda: ""
        self.states: dict[str, RouterState] = {}
        self.created: list[tuple[str, str]] = []
        self._clients: dict[str, ControllerClient] = {}
        self._lock = threading.Lock()

    def existing_routers(self) -> tuple[str, ...]:
        return ("router", *self._clients)

    def draining_nodes(self) -> dict[str, float]:
        return {}

    def routers_on(self, nodes: Collection[str]) -> frozenset[str]:
        return frozenset()

    def create_router(self, router: str, checkpoint: str) -> None:
        with self._lock:
            if router in self._clients:
                return
            self.created.append((router, checkpoint))
            self.states[router] = RouterState(router=router, address=f"127.0.0.1:{5000 + len(self.created)}")
            self._clients[router] = ControllerClient(
                router=router, resolve=lambda: self.where(), state=lambda: self.states[router]
            )

    def remove_router(self, router: str) -> None:
        with self._lock:
            client = self._clients.pop(router, None)
        if client is not None:
            client.close()

    def tell(self, router: str, *, running: int = 0, waiting: int = 0) -> None:
        self.states[router] = dataclasses.replace(self.states[router], running=running, waiting=waiting)


@pytest.fixture
def fleet() -> Iterator[FakeFleet]:
    routers = FakeFleet()
    yield routers
    for name in routers.existing_routers()[1:]:
        routers.remove_router(name)


@pytest.fixture
def cluster(fleet: FakeFleet, checkpoint: str) -> Iterator[LoopbackCluster]:
    """A cluster whose own router is the first one; the others belong to the fake fleet."""
    with LoopbackCluster(checkpoint, num_actors=1, router_supervisor=fleet, routers=SETTINGS) as running:
        running.told = RouterState(router="router", address=running.router_server.address)
        fleet.where = lambda: running.controller_server.address
        yield running


def seen(cluster: LoopbackCluster) -> dict[str, RouterState]:
    return {s.router: s for s in controller_status(cluster.controller_server.address).router_states}


def test_a_state_arrives_changes_and_goes_with_the_lease(cluster) -> None:
    wait_until(lambda: seen(cluster) == {"router": cluster.told})
    state = [RouterState(router="mine", address="127.0.0.1:1", running=2)]
    client = ControllerClient(router="mine", resolve=lambda: cluster.controller_server.address, state=lambda: state[0])
    wait_until(lambda: seen(cluster).get("mine") == state[0])
    state[0] = RouterState(router="mine", address="127.0.0.1:1", running=1, waiting=7, weight_version=3)
    wait_until(lambda: seen(cluster)["mine"] == state[0])
    client.close()
    assert "mine" in seen(cluster)
    wait_until(lambda: "mine" not in seen(cluster))
    assert controller_status(cluster.controller_server.address).routers == 1


def test_a_new_incarnation_takes_the_place_of_the_old_one_at_once(cluster) -> None:
    def live(state: RouterState) -> None:
        client = ControllerClient(router="mine", resolve=lambda: cluster.controller_server.address, state=lambda: state)
        wait_until(lambda: seen(cluster).get("mine") == state)
        client.close()

    live(RouterState(router="mine", address="127.0.0.1:1", running=3))
    live(RouterState(router="mine", address="127.0.0.1:2"))


def test_a_new_controller_hears_of_all_routers_again(cluster) -> None:
    wait_until(lambda: "router" in seen(cluster))
    cluster.replace_controller()
    wait_until(lambda: seen(cluster) == {"router": cluster.told})


def test_under_a_queue_routers_come_and_when_it_is_over_they_leave_and_end(cluster, fleet) -> None:
    cluster.told = dataclasses.replace(cluster.told, running=2, waiting=3)
    wait_until(lambda: set(seen(cluster)) == {"router", "router-1", "router-2"})
    assert all(checkpoint == cluster.controller.status().checkpoint for _, checkpoint in fleet.created)
    fleet.tell("router-2", running=1)
    cluster.told = dataclasses.replace(cluster.told, running=0, waiting=0)
    leaving = {"router": False, "router-1": True, "router-2": True}
    wait_until(lambda: {name: s.leaving for name, s in seen(cluster).items()} == leaving)
    wait_until(lambda: set(seen(cluster)) == {"router", "router-2"})
    assert seen(cluster)["router-2"].leaving, "its text is waited for"
    fleet.tell("router-2")
    wait_until(lambda: set(seen(cluster)) == {"router"} and set(fleet.existing_routers()) == {"router"})
    with ControllerCalls(cluster.controller_server.address) as calls:
        wait_until(lambda: all(o.phase.ended for o in calls.operations()))
        down, *_, up = [o for o in calls.operations() if o.kind is OperationKind.SCALE_ROUTERS]
    assert (up.arguments, down.arguments) == (("3",), ("1",)) and down.phase is OperationPhase.DONE
    assert "3.0 of which wait" in up.reason


def test_a_number_is_ordered_over_the_wire_and_a_successor_goes_on_with_it(cluster, fleet) -> None:
    cluster.told = dataclasses.replace(cluster.told, running=2)  # exactly the target of one router
    with ControllerCalls(cluster.controller_server.address) as calls:
        with pytest.raises(UserError, match="4 routers are beyond the limits, which are 1 to 3"):
            calls.scale_routers(4)
        calls.scale_routers(2, operation_id="grow")
        wait_until(lambda: calls.operation("grow").phase is OperationPhase.DONE)
        fleet.tell("router-1", running=1)
        calls.scale_routers(1, operation_id="shrink")
        wait_until(lambda: calls.operation("shrink").phase is OperationPhase.COMMITTING)
        wait_until(lambda: b"shrink" in cluster.services["expert-0"].status(with_snapshot=True).snapshot)
    cluster.replace_controller()
    wait_until(lambda: {n: s.leaving for n, s in seen(cluster).items()} == {"router": False, "router-1": True})
    fleet.tell("router-1")
    with ControllerCalls(cluster.controller_server.address) as calls:
        wait_until(lambda: calls.operation("shrink").phase is OperationPhase.DONE)
    assert fleet.existing_routers() == ("router",)


def test_a_cluster_whose_routers_are_not_the_controllers_says_so(checkpoint) -> None:
    with (
        LoopbackCluster(checkpoint, num_actors=1) as cluster,
        ControllerCalls(cluster.controller_server.address) as calls,
        pytest.raises(UserError, match="by other means"),
    ):
        calls.scale_routers(2)

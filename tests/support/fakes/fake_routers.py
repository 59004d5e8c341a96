"""Routers in this process, as a RouterSizing sees them: started ones serve when the test says so."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from moecluster.controller.context import new_context
from moecluster.controller.operations.routers import RouterSizing, RouterSizingSettings
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.errors import MoeClusterError
from moecluster.metrics import Metrics
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import Operation, OperationPhase, PlacementNumber, RouterState, WeightVersion

LEASE_S = 10.0
IDLE_S = 3.0

Make = Callable[..., RouterSizing]


class FakeRouters:
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


@contextmanager
def router_sizings() -> Iterator[Make]:
    """Makes a RouterSizing over some routers, with changed settings, and closes it afterwards."""
    made: list[RouterSizing] = []

    def start(routers: FakeRouters, **settings: Any) -> RouterSizing:
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

    try:
        yield start
    finally:
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

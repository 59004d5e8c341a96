"""Controllers over expert actors of this process, for tests of what a controller does as a whole."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moecluster.controller.controller import Controller
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.controller.settings import ControllerSettings
from moecluster.metrics import Metrics
from moecluster.placement.initial import contiguous_placement
from moecluster.types import Operation, Placement
from tests.support.clusters.fake_actors import FakeActors
from tests.support.clusters.given import any_directory
from tests.support.waiting import WAIT_S, wait_until

ACTORS = ("expert-0", "expert-1")
LAYER_EXPERTS = {0: 4, 1: 4}

MakeController = Callable[..., Controller]


@contextmanager
def controllers_over(actors: FakeActors, checkpoint: str) -> Iterator[MakeController]:
    """Makes controllers over the actors, and closes them. Takes fields of ControllerSettings, and arguments of
    Controller, that differ from the usual ones."""
    made: list[Controller] = []

    def make(**changes: Any) -> Controller:
        settings: dict[str, Any] = {
            "actors": ACTORS,
            "replicas": contiguous_placement(LAYER_EXPERTS, ACTORS),
            "layer_experts": LAYER_EXPERTS,
            "checkpoint": checkpoint,
            "health_period_s": 0.05,
            "start_timeout_s": 0.5,
        }
        others: dict[str, Any] = {"metrics": Metrics(model="tiny")}
        for key, value in changes.items():
            (settings if key in ControllerSettings.__dataclass_fields__ else others)[key] = value
        controller = Controller(
            ControllerSettings(**settings),
            is_given=any_directory,
            supervisor=actors,
            connect=actors.connect,
            watch=actors.watch,
            **others,
        )
        made.append(controller)
        return controller

    try:
        yield make
    finally:
        for controller in made:
            controller.close()


def static(slots: int = 2) -> dict[str, Any]:
    """Settings of a controller that changes what is requested, and nothing else."""
    return {
        "observer": ObserverSettings(slots_per_layer=slots),
        "reconciler": ReconcilerSettings(policy="static", period_s=0.02),
    }


def wait_for_placement(controller: Controller, condition: Callable[[Placement], bool]) -> Placement:
    """The first placement of which it is true."""
    deadline_s = time.monotonic() + WAIT_S
    placement = controller.current(WAIT_S)
    while not condition(placement):
        newer = controller.newer_than(placement.number, deadline_s - time.monotonic())
        assert newer is not None, f"the placement stayed {placement}"
        placement = newer
    return placement


def wait_ended(controller: Controller, operation: Operation) -> Operation:
    """The operation when it has ended."""
    wait_until(lambda: controller.operation(operation.id).phase.ended, operation.id)
    return controller.operation(operation.id)

"""Concurrent actor monitors: one reports an event while another one changes the cluster state."""

import threading
import time
from dataclasses import replace

from moecluster.controller.actors.manager import ActorManager, ActorManagerSettings
from moecluster.controller.context import new_context
from moecluster.controller.load.direct import DirectLoadSource
from moecluster.controller.load.reports import ActorReports
from moecluster.controller.state.handover import KeptSnapshot
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.metrics import Metrics
from moecluster.placement.initial import contiguous_placement
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import WeightVersion

LAYERS = {0: 4}
ACTORS = ("expert-0", "expert-1")


def unused(*_: object) -> None:
    raise AssertionError("no actor is looked after here")


def test_an_actor_is_lost_while_another_change_is_published() -> None:
    context = new_context(LAYERS, lease_s=10.0, board=PlacementBoard(), metrics=Metrics(model="tiny"))
    cluster_state = context.state
    publishing, lost_is_told = threading.Event(), threading.Event()

    def hold_up() -> None:  # called with the cluster state's lock held, before the actor monitors are
        if threading.current_thread() is changing:
            publishing.set()
            lost_is_told.wait(10.0)
            time.sleep(0.2)  # the other thread runs until it blocks

    context.signals.changed.listen(hold_up)
    changing = threading.Thread(target=cluster_state.set_held, args=(True,), daemon=True)

    class Reports(ActorReports):
        def forget(self, actor: str) -> None:
            """Called in the middle of actor_down: the other change has begun by then."""
            super().forget(actor)
            changing.start()
            assert publishing.wait(10.0)
            lost_is_told.set()

    actor_manager = ActorManager(
        replace(context, reports=Reports()),
        ActorManagerSettings(),
        direct=DirectLoadSource(LAYERS),
        supervisor=None,  # type: ignore[arg-type]
        connect=unused,  # type: ignore[arg-type]
        watch=unused,  # type: ignore[arg-type]
        snapshot=KeptSnapshot(context.state, context.operations, context.signals),
    )
    cluster_state.begin(
        term=1,
        generation=0,
        versions=WeightVersions.only(WeightVersion(version=1, checkpoint="/m")),
        actors=ACTORS,
        replicas=contiguous_placement(LAYERS, ACTORS),
    )
    cluster_state.open()
    losing = threading.Thread(target=actor_manager.actor_down, args=("expert-1",), daemon=True)
    losing.start()
    losing.join(10.0)
    changing.join(10.0)
    assert not losing.is_alive() and not changing.is_alive(), "they wait for each other"
    assert [o.reason for o in context.operations.under_way()] == ["expert-1 was lost with 2 replicas"]

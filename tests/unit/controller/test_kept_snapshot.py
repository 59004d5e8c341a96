"""The controller's snapshot kept by its actors: rebuilt after each change, and during changes."""

import threading
import time

from moecluster.controller.context import new_context
from moecluster.controller.state.handover import KeptSnapshot
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.metrics import Metrics
from moecluster.placement.initial import contiguous_placement
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.rpc.controller.snapshot import decode_snapshot
from moecluster.types import WeightVersion

LAYERS = {0: 4}
ACTORS = ("expert-0", "expert-1")


class Kept:
    """A cluster state whose changes invalidate its snapshot, with a hook that runs at each change."""

    def __init__(self) -> None:
        context = new_context(LAYERS, lease_s=1.0, board=PlacementBoard(), metrics=Metrics(model="tiny"))
        self.changed, self.cluster_state = context.signals.changed, context.state
        self.at_change = lambda: None
        self.changed.listen(lambda: self.at_change())
        self.snapshot = KeptSnapshot(context.state, context.operations, context.signals)
        self.cluster_state.begin(
            term=1,
            generation=0,
            versions=WeightVersions.only(WeightVersion(version=1, checkpoint="/m")),
            actors=ACTORS,
            replicas=contiguous_placement(LAYERS, ACTORS),
        )
        self.cluster_state.open()

    def actors(self) -> tuple[str, ...]:
        """The actors in the current snapshot."""
        return decode_snapshot(self.snapshot.encoded()).actors


def test_the_snapshot_is_made_anew_after_a_change_and_only_then() -> None:
    kept = Kept()
    first = kept.snapshot.encoded()
    assert kept.snapshot.encoded() is first and kept.actors() == ACTORS
    kept.cluster_state.add_actor("expert-2")
    assert kept.actors() == (*ACTORS, "expert-2")


def test_a_change_is_not_held_up_by_a_snapshot_that_is_being_made_and_waits_for_it() -> None:
    kept = Kept()
    kept.snapshot.encoded()
    reading = threading.Thread(target=kept.snapshot.encoded, daemon=True)

    def read_amid_the_change() -> None:
        kept.at_change = lambda: None
        kept.changed.emit()
        reading.start()
        time.sleep(0.2)  # it has begun, and waits for the state that is being changed

    kept.at_change = read_amid_the_change
    changing = threading.Thread(target=kept.cluster_state.remove_actor, args=("expert-1",), daemon=True)
    changing.start()
    changing.join(10.0)
    assert not changing.is_alive(), "the change waits for the snapshot, and the snapshot for the change"
    reading.join(10.0)
    assert not reading.is_alive() and kept.actors() == ("expert-0",)

"""The policy's view of actors that are up but have not loaded all their experts yet."""

from moecluster.controller.context import new_context
from moecluster.controller.load.direct import SourceReading
from moecluster.controller.rebalance.observe import Observer, ObserverSettings
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.metrics import Metrics
from moecluster.placement.names import to_replicas
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import ActorAddress, ExpertId, Replica, WeightVersion

EXPERTS = tuple(ExpertId(layer=0, index=index) for index in range(3))


class NoLoads:
    def read(self, now_s: float) -> SourceReading:
        raise AssertionError("nothing is read here")


def test_a_replica_that_is_still_loaded_keeps_its_place_unless_its_expert_is_lost() -> None:
    context = new_context({0: 3}, lease_s=1.0, board=PlacementBoard(), metrics=Metrics(model="tiny"))
    cluster_state = context.state
    both = {(EXPERTS[0], "expert-0"), (EXPERTS[1], "expert-0"), (EXPERTS[0], "expert-1"), (EXPERTS[2], "expert-1")}
    cluster_state.begin(
        term=1,
        generation=0,
        versions=WeightVersions.only(WeightVersion(version=1, checkpoint="/m")),
        actors=("expert-0", "expert-1"),
        replicas=[Replica(expert=expert, actor=actor) for expert, actor in sorted(both)],
    )
    observer = Observer(context, NoLoads(), ObserverSettings(slots_per_layer=3))

    def placed(held_by_1: list[ExpertId]) -> set[tuple[ExpertId, str]]:
        cluster_state.actor_up(ActorAddress(actor="expert-0", address="127.0.0.1:1", incarnation="a"), EXPERTS[:2])
        cluster_state.actor_up(ActorAddress(actor="expert-1", address="127.0.0.1:2", incarnation="b"), held_by_1)
        seen = observer.observe(0.0)
        return {(r.expert, r.actor) for r in to_replicas(seen.observation.layout, seen.names)[0]}

    assert placed([]) == both - {(EXPERTS[2], "expert-1")}
    assert placed([EXPERTS[2]]) == both

"""Settings of a controller, and those of its parts that follow from them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from moecluster.controller.actors.manager import ActorManagerSettings
from moecluster.controller.operations.routers import RouterSizingSettings
from moecluster.controller.operations.weight_rollout import UpdateSettings
from moecluster.controller.rebalance.apply import ApplierSettings
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.rpc.controller.snapshot import ControllerSnapshot
from moecluster.types import Replica


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """Settings of a controller."""

    actors: tuple[str, ...]
    replicas: tuple[Replica, ...]
    layer_experts: Mapping[int, int]  # MoE layer -> its number of experts
    checkpoint: str  # a directory visible to the expert actors
    dtype: str = ""  # empty: the checkpoint's
    lease_s: float = 10.0
    health_period_s: float = 1.0
    start_timeout_s: float = 60.0  # for Ray to restart an actor
    load_timeout_s: float = 60.0
    max_actors: int = 0  # upper limit of scale requests; 0: no limit
    min_actors: int = 1
    observer: ObserverSettings | None = None  # None: as many slots as the replicas take
    reconciler: ReconcilerSettings = field(default_factory=lambda: ReconcilerSettings(policy="static"))
    applier: ApplierSettings = field(default_factory=ApplierSettings)
    update: UpdateSettings = field(default_factory=UpdateSettings)
    routers: RouterSizingSettings = field(default_factory=RouterSizingSettings)

    @property
    def actor_manager(self) -> ActorManagerSettings:
        """Settings of the actor manager."""
        return ActorManagerSettings(
            dtype=self.dtype,
            health_period_s=self.health_period_s,
            start_timeout_s=self.start_timeout_s,
            load_timeout_s=self.load_timeout_s,
        )

    @property
    def observing(self) -> ObserverSettings:
        """Settings of the observer: the load window, and the slots per actor."""
        if self.observer is not None:
            return self.observer
        taken = Counter((r.actor, r.expert.layer) for r in self.replicas)
        return ObserverSettings(slots_per_layer=max(taken.values()))

    @property
    def first_snapshot(self) -> ControllerSnapshot:
        """The state of a new cluster."""
        return ControllerSnapshot(actors=self.actors, leaving=(), replicas=self.replicas, operations=(), cold=())

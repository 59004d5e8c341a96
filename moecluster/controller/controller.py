"""The controller: which experts stand where, published to the routers; lost actors are filled again, load is followed.

It keeps no state that it cannot read back from the actors. A new one takes a higher term, tells it to the actors (which
then refuse older orders), and goes on with the snapshot that they keep: what stands, what is leaving, what was ordered.
Here is the outside: what routers, users, actor monitors and a successor see. Changes are made by the reconciler's
thread.
"""

import logging
import time
from collections.abc import Callable, Sequence

from moecluster.controller.actors.interfaces import ActorSupervisor, Watch
from moecluster.controller.actors.manager import ActorManager
from moecluster.controller.context import new_context
from moecluster.controller.load.direct import DirectLoadSource, LoadSource
from moecluster.controller.operations.expert_actors import Sizing
from moecluster.controller.operations.requests import OperationRequests
from moecluster.controller.operations.routers import RouterSizing, RouterSupervisor
from moecluster.controller.operations.weight_rollout import WeightUpdates
from moecluster.controller.rebalance.apply import PlacementApplier
from moecluster.controller.rebalance.decide import Planner
from moecluster.controller.rebalance.observe import Observer
from moecluster.controller.rebalance.recovery import Recovery
from moecluster.controller.reconciler import Reconciler
from moecluster.controller.settings import ControllerSettings
from moecluster.controller.state.handover import KeptSnapshot, initial_state
from moecluster.controller.state.router_leases import Lease
from moecluster.errors import ResourceError, UserError
from moecluster.metrics import Metrics
from moecluster.models.checkpoint.reader import OpenCheckpoint
from moecluster.models.given_directories import IsGiven
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.rpc.expert.interface import Connect
from moecluster.types import (
    ClusterLoads,
    ControllerStatus,
    ExpertId,
    LoadSnapshot,
    Operation,
    Placement,
    PlacementNumber,
    PlanPreview,
    RouterState,
)

logger = logging.getLogger(__name__)


class Controller:
    """Looks after the expert actors, and is the source of placements. Thread-safe."""

    def __init__(
        self,
        settings: ControllerSettings,
        *,
        supervisor: ActorSupervisor,
        connect: Connect,
        watch: Watch,
        metrics: Metrics,
        is_given: IsGiven,
        source: LoadSource | None = None,
        routers: RouterSupervisor | None = None,
        on_deposed: Callable[[], None] = lambda: None,
        announce: Callable[[str], None] = lambda checkpoint: None,
        open_elsewhere: OpenCheckpoint | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """is_given: whether weights may be loaded out of a directory. source: where loads come from; by default the
        routers' reports. routers: None: they are not started or ended from here. on_deposed is called when another
        controller has taken over. announce: lets nodes that do not see a directory read it, if a node that can give it
        does. open_elsewhere: opens checkpoints that this node does not see. clock: seconds, for leases and
        durations."""
        self.lease_s = settings.lease_s
        self._settings = settings
        self._supervisor = supervisor
        self._metrics = metrics
        self._clock = clock
        self._board = PlacementBoard()
        context = new_context(
            settings.layer_experts, lease_s=settings.lease_s, board=self._board, metrics=metrics, clock=clock
        )
        context.signals.deposed.listen(on_deposed)
        self._cluster_state, self._leases, self._log = context.state, context.leases, context.operations
        self._reports, self._signals = context.reports, context.signals
        self._direct = DirectLoadSource(settings.layer_experts, clock=clock)
        self._monitors = ActorManager(
            context,
            settings.actor_manager,
            direct=self._direct,
            supervisor=supervisor,
            connect=connect,
            watch=watch,
            snapshot=KeptSnapshot(context.state, context.operations, context.signals),
        )
        slots_per_layer = settings.observing.slots_per_layer
        self._observer = Observer(context, source or self._direct, settings.observing)
        self._planner = Planner(context, settings.reconciler.policy, self._observer)
        recovery = Recovery(context, slots_per_layer=slots_per_layer)
        applier = PlacementApplier(context, settings.applier, connect=connect, recovery=recovery)
        self._sizing = Sizing(
            context, supervisor=supervisor, actor_manager=self._monitors, slots_per_layer=slots_per_layer
        )
        self._reconciler = Reconciler(
            context,
            settings.reconciler,
            planner=self._planner,
            recovery=recovery,
            applier=applier,
            sizing=self._sizing,
            updates=WeightUpdates(context, settings.update),
            supervisor=supervisor,
        )
        self._orders = OperationRequests(
            context,
            min_actors=settings.min_actors,
            max_actors=settings.max_actors,
            sizing=self._sizing,
            is_given=is_given,
            announce=announce,
            open_elsewhere=open_elsewhere,
        )
        self._routers: RouterSizing | None = None
        if routers is not None:
            self._routers = RouterSizing(context, settings.routers, supervisor=routers)

    def start(self, timeout_s: float) -> None:
        """Reads what the actors hold, loads what is missing, and publishes the first placement.

        An actor that does not come up is tried on and on, without being waited for. Raises UserError if an actor
        refuses its experts for something that the user can mend, ResourceError if none came up within the timeout;
        a successor raises neither, as it has a cluster to look after.
        """
        succeeds, awaited = self._take_over()
        self._monitors.start(self._cluster_state.actors, awaited=awaited)
        failures = self._monitors.wait_tried(timeout_s)
        if not succeeds and failures and isinstance(failures[0], UserError):
            raise failures[0]
        if not succeeds and not self._cluster_state.up():
            why = f"; {failures[0]}" if failures else ""
            raise ResourceError(f"no expert actor was ready within {timeout_s:g} s{why}")
        self._cluster_state.open()
        self._leases.opened()
        self._reconciler.start()
        if self._routers is not None:
            self._routers.start()

    def close(self) -> None:
        """Leaves the actors as they are: a successor finds them."""
        if self._routers is not None:
            self._routers.close()
        self._reconciler.close()
        self._monitors.close()
        self._board.close()

    @property
    def started_s(self) -> float:
        """When it began to make changes, by its clock."""
        return self._reconciler.started_s

    # -- what routers see --

    def current(self, timeout_s: float) -> Placement:
        """The current placement; waits for a first one. Raises Unavailable after the timeout."""
        return self._board.current(timeout_s)

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        """Waits for a placement with a higher number; None after the timeout."""
        return self._board.newer_than(number, timeout_s)

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        """A router got no answer. The actor's own answer, or silence, to the controller decides."""
        logger.info("%s (%s) is reported: %s", actor, incarnation, reason)
        self._monitors.check(actor)

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """A router had NaN or infinity of a replica: it is set aside, and loaded anew once."""
        self._monitors.report_nonfinite(actor, incarnation, expert, placement)

    def renew_lease(
        self, router: str, applied: PlacementNumber, *, hold: bool = False, state: RouterState | None = None
    ) -> None:
        """The router counts for lease_s from now on, and stands as it says. hold: nothing may move while it trains."""
        if self._leases.renew(router, applied, hold=hold, state=state):
            self._signals.wake.emit()

    def leases(self) -> dict[str, Lease]:
        """Routers that hold a lease now."""
        return self._leases.current()

    def report_load(self, router: str, load: LoadSnapshot) -> None:
        """What a router counted in its last window. Raises InvalidMessage for experts that there are not."""
        self._direct.add(router, load)

    def want_experts(self, router: str, experts: Sequence[ExpertId]) -> None:
        """Experts that stand nowhere on purpose are loaded again. Raises InvalidMessage for experts that there are
        not."""
        self._orders.activate(router, experts)

    # -- what users and training order --

    def set_checkpoint(self, checkpoint: str) -> None:
        """Lost experts are loaded from this directory from now on. Raises NotGiven, and CheckpointError for one
        that cannot be."""
        self._orders.set_checkpoint(checkpoint)

    def scale(self, expert_actors: int, *, operation_id: str = "") -> Operation:
        """Begins to make it so many actors. Raises ResourceError beyond the limits, or while training holds them."""
        return self._orders.scale(expert_actors, operation_id)

    def scale_routers(self, routers: int, *, operation_id: str = "") -> Operation:
        """Begins to make it so many routers; goes on while training holds the placement. Raises ResourceError beyond
        the limits."""
        if self._routers is None:
            raise ResourceError("scale: the routers of this cluster are started and ended by other means")
        return self._routers.order(routers, operation_id=operation_id)

    def drain(self, node: str, *, operation_id: str = "") -> Operation:
        """Begins to empty a node (its id, or how it begins), or one expert actor. Raises ResourceError if there is
        none of that name."""
        return self._orders.drain(node, operation_id)

    def place(self, expert: ExpertId, actors: Sequence[str], *, operation_id: str = "") -> Operation:
        """Begins to let an expert stand on exactly these actors; none: nowhere, until a token wants it."""
        return self._orders.place(expert, actors, operation_id)

    def update(self, checkpoint: str, *, operation_id: str = "") -> Operation:
        """Begins to replace all weights by those of a directory, while they serve. Raises CheckpointError for one that
        is not whole or of another shape than what is served, ResourceError while training holds the placement."""
        return self._orders.update(checkpoint, operation_id)

    def plan(self, policy: str) -> PlanPreview:
        """What a policy would do now; empty: the cluster's own. Does nothing."""
        return self._planner.preview(policy)

    def operation(self, operation_id: str) -> Operation:
        """How an operation stands. Raises ResourceError if it is not known."""
        return self._log.get(operation_id)

    def operations(self, limit: int) -> tuple[Operation, ...]:
        """The newest operations first; 0: all that are kept."""
        return self._log.newest(limit)

    def status(self) -> ControllerStatus:
        """The cluster as it was last seen."""
        number = self._cluster_state.number
        routers = self._routers.states() if self._routers is not None else tuple(self._leases.states().values())
        return ControllerStatus(
            term=number.term,
            generation=number.generation,
            actors=self._monitors.states(),
            checkpoint=self._cluster_state.versions.checkpoint,
            routers=len(routers),
            policy=self._settings.reconciler.policy,
            held=self._cluster_state.held,
            replicas=len(self._cluster_state.replicas()),
            cold_experts=len(self._cluster_state.cold),
            operations=self._log.under_way(),
            router_states=routers,
            weight_version=self._cluster_state.versions.weight_version,
            replicas_aside=self._monitors.replicas_aside(),
            lost_experts=len(self._cluster_state.lost()),
        )

    def loads(self) -> ClusterLoads:
        """What was counted since the controller began."""
        return ClusterLoads(
            time_s=time.time(),
            model=self._metrics.model,
            tokens={
                router: {layer: tuple(tokens_E.tolist()) for layer, tokens_E in layers.items()}
                for router, layers in self._direct.read(self._clock()).counters.tokens.items()
            },
            actors=self._observer.actor_loads(),
            layer_experts=dict(self._settings.layer_experts),
            expert_bytes=dict.fromkeys(self._settings.layer_experts, self._reports.expert_bytes()),
        )

    # -- inside --

    def _take_over(self) -> tuple[bool, set[str]]:
        """Takes a higher term than every actor has seen, and the newest snapshot they keep. Returns whether there is
        one (not when the cluster is started), and the actors that the first placement waits for."""
        candidates = tuple(dict.fromkeys((*self._supervisor.known(), *self._settings.actors)))
        seen = self._monitors.read(candidates)
        found = initial_state(seen, first=self._settings.first_snapshot, checkpoint=self._settings.checkpoint)
        snapshot = found.snapshot
        self._log.take_over(snapshot.operations)
        self._cluster_state.begin(
            term=found.term,
            generation=found.generation,
            versions=found.versions,
            actors=snapshot.actors,
            leaving=snapshot.leaving,
            replicas=snapshot.replicas,
            cold=snapshot.cold,
        )
        known = set(self._supervisor.known())
        self._sizing.add(actor for actor in snapshot.actors if known and actor not in known)
        for actor in sorted(known - set(snapshot.actors)):
            self._cluster_state.add_actor(actor)  # begun by an operation that goes on now
        answered = {status.actor for status in seen} if found.succeeds else set(self._cluster_state.actors)
        return found.succeeds, answered & set(self._cluster_state.actors)

"""The controller: publishes to the routers which actors hold which experts, restores lost experts, follows the load.

It keeps no state that it cannot read back from the actors. A new controller takes a higher term, sends it to the actors
(which then refuse requests of older terms), and continues from the snapshot that they keep: the placement, the actors
that are leaving, the operations. This module is the interface to routers, users and a successor; the reconciler's
thread makes the changes.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from moecluster.controller.actors.interfaces import ActorSupervisor, Watch
from moecluster.controller.actors.manager import ActorManager
from moecluster.controller.context import new_context
from moecluster.controller.figures import cluster_figures
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
from moecluster.errors import MoeClusterError, ResourceError, UserError
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
    ProcessInfo,
    RouterState,
)

logger = logging.getLogger(__name__)

NOT_TOLD = ProcessInfo()
CLOSE_TIMEOUT_S = 10.0  # of its own threads, before all processes are ended


class Controller:
    """Manages the expert actors, and is the source of placements. Thread-safe."""

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
        end: Callable[[], None] | None = None,
        process: ProcessInfo = NOT_TOLD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """is_given: whether weights may be loaded from a directory. source: where loads come from; by default the
        routers' reports. routers: None if this controller does not start and end routers. on_deposed is called when
        another controller has taken over. announce: makes a directory readable on nodes that do not see it, if a node
        that sees it can serve it. open_elsewhere: opens checkpoints that this node does not see. end: ends every
        process of the cluster, this one last; None if that is done by other means. process: this one, for operators.
        clock: seconds, for leases and durations."""
        self.lease_s = settings.lease_s
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._process = process
        self._end = end
        self._ending = threading.Lock()  # held from the first request to shut down
        self._board = PlacementBoard()
        context = new_context(
            settings.layer_experts, lease_s=settings.lease_s, board=self._board, metrics=metrics, clock=clock
        )
        context.signals.deposed.listen(on_deposed)
        self._cluster_state, self._leases, self._log = context.state, context.leases, context.operations
        self._reports, self._signals = context.reports, context.signals
        self._direct = DirectLoadSource(settings.layer_experts, clock=clock)
        self._actor_manager = ActorManager(
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
            context, supervisor=supervisor, actor_manager=self._actor_manager, slots_per_layer=slots_per_layer
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
        self._requests = OperationRequests(
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
        metrics.watch_cluster(partial(cluster_figures, context, self._planner, self.status))

    def start(self, timeout_s: float) -> None:
        """Reads what the actors hold, loads what is missing, and publishes the first placement.

        An actor that does not come up is retried in the background. Raises UserError if an actor refuses its experts
        for a reason that the user can fix, ResourceError if no actor came up within the timeout; a successor raises
        neither, since it has a running cluster to manage. Raises Unavailable if the supervisor does not answer in time.
        """
        succeeds, awaited = self._take_over()
        self._actor_manager.start(self._cluster_state.actors, awaited=awaited)
        failures = self._actor_manager.wait_tried(timeout_s)
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
        """Stops the controller and leaves the actors running, for a successor."""
        if self._routers is not None:
            self._routers.close()
        self._reconciler.close()
        self._actor_manager.close()
        self._board.close()

    @property
    def started_s(self) -> float:
        """When the reconciler started, by the controller's clock."""
        return self._reconciler.started_s

    # -- for routers --

    def current(self, timeout_s: float) -> Placement:
        """Returns the current placement, waiting for the first one. Raises Unavailable after the timeout."""
        return self._board.current(timeout_s)

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        """Waits for a placement with a higher number; None after the timeout."""
        return self._board.newer_than(number, timeout_s)

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        """A router got no answer from an actor. The controller checks the actor itself before it counts as lost."""
        logger.info("%s (%s) was reported as failed: %s", actor, incarnation, reason)
        self._actor_manager.check(actor)

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """A router received NaN or infinity from a replica: sets it aside, and reloads it once."""
        self._actor_manager.report_nonfinite(actor, incarnation, expert, placement)

    def renew_lease(
        self, router: str, applied: PlacementNumber, *, hold: bool = False, state: RouterState | None = None
    ) -> None:
        """Renews a router's lease for lease_s, with its reported state. hold: it trains, so no expert may move."""
        if self._leases.renew(router, applied, hold=hold, state=state):
            self._signals.wake.emit()

    def leases(self) -> dict[str, Lease]:
        """Returns the routers whose leases have not expired."""
        return self._leases.current()

    def report_load(self, router: str, load: LoadSnapshot) -> None:
        """Adds what a router counted in its last window. Raises InvalidMessage for unknown experts."""
        self._direct.add(router, load)

    def want_experts(self, router: str, experts: Sequence[ExpertId]) -> None:
        """Requests that the cold ones among these experts be loaded. Raises InvalidMessage for unknown experts."""
        self._requests.activate(router, experts)

    # -- for users and training --

    def set_checkpoint(self, checkpoint: str) -> None:
        """Sets the directory that lost experts are loaded from. Raises NotGiven, or CheckpointError if it is not
        usable."""
        self._requests.set_checkpoint(checkpoint)

    def scale(self, expert_actors: int, *, operation_id: str = "") -> Operation:
        """Requests a number of expert actors. Raises ResourceError beyond the limits, or while training holds the
        placement."""
        return self._requests.scale(expert_actors, operation_id)

    def scale_routers(self, routers: int, *, operation_id: str = "") -> Operation:
        """Requests a number of routers, even while training holds the placement. Raises ResourceError beyond the
        limits, or if this controller does not start and end routers."""
        if self._routers is None:
            raise ResourceError("scale: the routers of this cluster are started and ended by other means")
        return self._routers.request(routers, operation_id=operation_id)

    def drain(self, node: str, *, operation_id: str = "") -> Operation:
        """Requests that a node (its id or a prefix of it) or one expert actor be drained. Raises ResourceError if there
        is none of that name, or while training holds the placement."""
        return self._requests.drain(node, operation_id)

    def place(self, expert: ExpertId, actors: Sequence[str], *, operation_id: str = "") -> Operation:
        """Requests replicas of an expert on exactly these actors; none: the expert is cold until a token needs it."""
        return self._requests.place(expert, actors, operation_id)

    def update(self, checkpoint: str, *, operation_id: str = "") -> Operation:
        """Requests that all weights be replaced by those of a directory, while serving. Raises CheckpointError if it is
        incomplete or its shape differs from the served model, ResourceError while training holds the placement."""
        return self._requests.update(checkpoint, operation_id)

    def plan(self, policy: str) -> PlanPreview:
        """Returns what a policy (empty: the cluster's own) would do now, without doing it."""
        return self._planner.preview(policy)

    def operation(self, operation_id: str) -> Operation:
        """Returns an operation in its current state. Raises ResourceError for an unknown id."""
        return self._log.get(operation_id)

    def operations(self, limit: int) -> tuple[Operation, ...]:
        """Returns at most limit operations, newest first; 0: all that are kept."""
        return self._log.newest(limit)

    def shut_down(self) -> None:
        """Begins to end every process of the cluster, this one last. Raises ResourceError if this controller does not
        do that."""
        if self._end is None:
            raise ResourceError("down: the processes of this cluster are started and ended by other means")
        if self._ending.acquire(blocking=False):
            threading.Thread(target=self._shut_down, args=(self._end,), name="shut-down", daemon=True).start()

    def status(self) -> ControllerStatus:
        """Returns the last known state of the cluster."""
        number = self._cluster_state.number
        routers = self._routers.states() if self._routers is not None else tuple(self._leases.states().values())
        return ControllerStatus(
            term=number.term,
            generation=number.generation,
            actors=self._actor_manager.states(),
            checkpoint=self._cluster_state.versions.checkpoint,
            routers=len(routers),
            policy=self._settings.reconciler.policy,
            held=self._cluster_state.held,
            replicas=len(self._cluster_state.replicas()),
            cold_experts=len(self._cluster_state.cold),
            operations=self._log.under_way(),
            router_states=routers,
            weight_version=self._cluster_state.versions.weight_version,
            replicas_aside=self._actor_manager.replicas_aside(),
            lost_experts=len(self._cluster_state.lost()),
            cluster=self._metrics.cluster,
            process=self._process,
        )

    def loads(self) -> ClusterLoads:
        """Returns what was counted since the controller started."""
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

    # -- internal --

    def _shut_down(self, end: Callable[[], None]) -> None:
        closing = threading.Thread(target=self.close, name="close", daemon=True)  # so that nothing is restored
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)
        try:
            end()
        except MoeClusterError as exc:
            logger.error("the cluster is not ended: %s", exc)
            self._ending.release()  # the request may be repeated

    def _take_over(self) -> tuple[bool, set[str]]:
        """Takes a higher term than every actor has seen, and the newest snapshot that they keep. Returns whether there
        is one (not in a new cluster), and the actors that the first placement waits for."""
        known = self._actor_manager.existing(self._settings.start_timeout_s)
        candidates = tuple(dict.fromkeys((*known, *self._settings.actors)))
        seen = self._actor_manager.read(candidates)
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
        known = self._actor_manager.existing(self._settings.start_timeout_s)
        self._sizing.add(actor for actor in snapshot.actors if known and actor not in known)
        resizing = any(o.kind.waits_for_actors and not o.phase.ended for o in snapshot.operations)
        if resizing or not found.succeeds:  # otherwise they are strays
            for actor in sorted(set(known) - set(snapshot.actors)):
                self._cluster_state.add_actor(actor)  # created by an operation that continues now
        answered = {status.actor for status in seen} if found.succeeds else set(self._cluster_state.actors)
        return found.succeeds, answered & set(self._cluster_state.actors)

"""The one thread that changes a cluster: what is lost first, then what users ordered, then what the policy decides.

One change at a time; an optional one gives way to lost experts between two layers. While a training run holds the
placement, every expert stands once, and nothing moves.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from moecluster.controller.actors.interfaces import ActorSupervisor
from moecluster.controller.load.reports import ActorReports
from moecluster.controller.operations.executor import KINDS, SIZES, OperationExecutor, experts_of
from moecluster.controller.operations.expert_actors import Sizing
from moecluster.controller.operations.periodic_thread import FAILED_INSIDE, PeriodicThread
from moecluster.controller.operations.routers import KIND as ROUTERS
from moecluster.controller.operations.weight_rollout import KIND as UPDATE
from moecluster.controller.operations.weight_rollout import WeightUpdates
from moecluster.controller.rebalance.apply import Interrupted, PlacementApplier
from moecluster.controller.rebalance.decide import LayerReplicas, Planner
from moecluster.controller.rebalance.measure import BalanceMeter
from moecluster.controller.rebalance.observe import Seen, with_budget
from moecluster.controller.state.cluster_state import ClusterState
from moecluster.controller.state.operation_log import OperationLog
from moecluster.controller.state.router_leases import Leases
from moecluster.errors import Exhausted, MoeClusterError, Unavailable, UserError
from moecluster.metrics import Metrics
from moecluster.placement.initial import all_experts
from moecluster.placement.scaling import SizeObservation, SizeSettings, SizeState, decide_size
from moecluster.types import ExpertId, Operation, OperationPhase, Replica

logger = logging.getLogger(__name__)

MIN_COVERED_S = 1.0  # a shorter look at the load decides nothing


@dataclass(frozen=True, kw_only=True)
class ReconcilerSettings:
    """When changes are made."""

    policy: str = "share"
    period_s: float = 2.0
    quiet_s: float = 0.0  # after the start nothing is decided: routers that hold the placement must be heard first
    operation_timeout_s: float = 600.0
    scale_to_zero_after_s: float = 0.0  # 0: never
    size: SizeSettings | None = None  # None: the size is changed by orders alone


class Reconciler:
    """Begins with start, ends with close."""

    def __init__(
        self,
        settings: ReconcilerSettings,
        *,
        cluster_state: ClusterState,
        leases: Leases,
        log: OperationLog,
        planner: Planner,
        applier: PlacementApplier,
        sizing: Sizing,
        updates: WeightUpdates,
        supervisor: ActorSupervisor,
        reports: ActorReports,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._cluster_state = cluster_state
        self._leases = leases
        self._log = log
        self._planner = planner
        self._applier = applier
        self._sizing = sizing
        self._updates = updates
        self._supervisor = supervisor
        self._reports = reports
        self._clock = clock
        self._started_s = clock()
        self._size_state = SizeState()
        self._tried_in_vain: tuple[frozenset[ExpertId], frozenset[str]] | None = None  # what was lost, who was up
        self._first_tried_s: dict[str, float] = {}  # by operation that is not ended
        self._drained_last: dict[str, frozenset[str]] = {}  # node -> actors that were to stay when Ray named it
        self._woken_s: dict[ExpertId, float] = {}  # when experts were woken
        self._balance = BalanceMeter(cluster_state, planner, log, metrics, clock=clock)
        self._ordered = OperationExecutor(
            cluster_state=cluster_state, log=log, planner=planner, applier=applier, sizing=sizing
        )
        self._rounds = PeriodicThread(
            "changer",
            self._run_once,
            period_s=lambda: settings.period_s,
            without_result="no change was made",
            on_bug=self._fail_all,
        )

    def start(self) -> None:
        self._started_s = self._clock()
        self._rounds.start()

    def close(self) -> None:
        """What is under way ends as an operation that a successor finds unfinished."""
        self._rounds.close()

    def wake(self) -> None:
        """There is something to do."""
        self._rounds.wake()

    def recovery_waits(self) -> bool:
        """Whether experts are lost that could be loaded on actors that are up, as far as was not tried in vain."""
        return self._can_recover() and self._lost_of_up() != self._tried_in_vain

    # -- the thread --

    def _run_once(self) -> None:
        """One round: recover, read, carry out what was ordered, then what the policy decides."""
        held = self._leases.any_hold() and (self._cluster_state.held or self._updates.make_room())
        if held and not self._cluster_state.held:
            self._ensure_one_replica_each()
        self._cluster_state.set_held(held)
        if not held and self._can_recover():
            self._restore_elsewhere()
        self._planner.read()  # takes seconds if a Prometheus server hangs
        self._balance.show()
        if held:
            return
        self._updates.check()
        self._drain_leaving_nodes()
        if not self._carry_out_all():
            return
        self._balance.measure_gains()
        if self._clock() - self._started_s >= self._settings.quiet_s:
            self._resize()
            self._evict_idle()
            self._decide()

    def _fail_all(self) -> None:
        """A bug must not leave an operation under way for ever."""
        for operation in self._log.under_way():
            others = ("restore", ROUTERS, UPDATE)  # whoever carries these out sees to it
            if operation.phase is not OperationPhase.QUEUED and operation.kind not in others:
                self._log.update(operation.id, phase=OperationPhase.FAILED, detail=FAILED_INSIDE)

    def _carry_out_all(self) -> bool:
        """What is queued; False if a recovery comes first. A node that goes is emptied first. Numbers of actors are
        reached in their order, and while one waits for actors all else goes on."""
        waiting = False
        for operation in sorted(self._log.queued(KINDS), key=lambda o: o.kind != "drain"):
            if self._rounds.closed:
                return False
            if waiting and operation.kind == "scale":
                continue
            try:
                ended = self._carry_out(operation)
            except Interrupted as exc:
                self._log.update(operation.id, phase=OperationPhase.QUEUED, detail=str(exc))
                self._rounds.wake()
                return False
            waiting = waiting or not ended
        return True

    def _carry_out(self, operation: Operation) -> bool:
        """False if it waits for actors: it is queued again. Raises Interrupted if it gave way to a recovery."""
        self._first_tried_s.setdefault(operation.id, self._clock())
        self._log.update(operation.id, phase=OperationPhase.PREPARING, detail="")
        missing = self._missing()  # it may fail for one that is back by then
        try:
            self._ordered.carry_out(operation)
        except Interrupted:
            raise
        except MoeClusterError as exc:
            if self._is_worth_another_try(operation, exc, missing | self._missing()):
                self._log.update(operation.id, phase=OperationPhase.QUEUED, detail=f"waits: {exc}")
                return False
            logger.warning("%s failed: %s", operation.id, exc)
            self._ordered.take_back(operation)
            self._log.update(operation.id, phase=OperationPhase.FAILED, detail=str(exc))
        else:
            self._finish(operation.id)
            if operation.kind == "wake":
                self._woken_s |= dict.fromkeys(experts_of(operation), self._clock())
        self._first_tried_s.pop(operation.id)
        return True

    def _missing(self) -> set[str]:
        """Actors that are to stay and do not serve now."""
        return set(self._sizing.staying()) - self._cluster_state.up().keys()

    def _is_worth_another_try(self, operation: Operation, error: MoeClusterError, missing: Collection[str]) -> bool:
        """A size that is ordered waits for actors that are asked for or lost, within limits; a placement does not."""
        if operation.kind not in SIZES or self._rounds.closed:
            return False
        tried_s = self._clock() - self._first_tried_s[operation.id]
        return tried_s < self._settings.operation_timeout_s and (isinstance(error, Unavailable) or bool(missing))

    def _apply(self, operation_id: str, target: LayerReplicas, *, urgent: bool = False) -> None:
        """Carries out what was decided here; it ends, well or not."""
        try:
            self._applier.apply(operation_id, target, urgent=urgent)
        except MoeClusterError as exc:
            self._log.update(operation_id, phase=OperationPhase.FAILED, detail=str(exc))
        else:
            self._finish(operation_id)

    def _finish(self, operation_id: str) -> None:
        self._log.update(operation_id, phase=OperationPhase.DONE, detail="")
        self._balance.ended(operation_id)

    # -- what must be --

    def _restore_elsewhere(self) -> None:
        """Loads lost experts into free slots at once, instead of waiting until their actor is back."""
        lost = sorted(self._cluster_state.lost())
        names = ", ".join(map(str, lost[:4])) + (", ..." if len(lost) > 4 else "")
        seen, before = with_budget(self._planner.seen(), 0.0), self._lost_of_up()
        self._apply_decision("restore", seen, f"{len(lost)} experts were lost ({names})", urgent=True)
        # Orders need not give way to what does not help.
        self._tried_in_vain = before if self._cluster_state.lost() else None

    def _can_recover(self) -> bool:
        return bool(self._cluster_state.lost()) and self._has_free_slots()

    def _lost_of_up(self) -> tuple[frozenset[ExpertId], frozenset[str]]:
        return self._cluster_state.lost(), frozenset(self._cluster_state.up())

    def _has_free_slots(self) -> bool:
        up = [a for a in self._cluster_state.up() if a not in self._cluster_state.leaving]
        replicas = self._cluster_state.replicas()
        for layer in {expert.layer for expert in self._cluster_state.lost()}:
            cluster_state = sum(r.expert.layer == layer and r.actor in up for r in replicas)
            if cluster_state < len(up) * self._planner.observer.settings.slots_per_layer:
                return True
        return False

    def _ensure_one_replica_each(self) -> None:
        """Training takes one replica of each expert, and every expert."""
        target: dict[int, tuple[Replica, ...]] = {}
        up = sorted(set(self._cluster_state.up()) - self._cluster_state.leaving)
        for expert in all_experts(self._cluster_state.layer_experts):
            cluster_state = [r for r in self._cluster_state.replicas_of(expert.layer) if r.expert == expert]
            living = [r for r in cluster_state if r.actor in up] or cluster_state
            best = max(living, key=lambda r: (r.share, r.actor), default=None)
            actor = best.actor if best is not None else up[expert.index % len(up)] if up else None
            if actor is not None:
                target[expert.layer] = (*target.get(expert.layer, ()), Replica(expert=expert, actor=actor))
        if any(
            target.get(layer) != self._cluster_state.replicas_of(layer) for layer in self._cluster_state.layer_experts
        ):
            operation = self._log.begin("hold", reason="a training run takes one replica of every expert")
            self._apply(operation.id, target, urgent=True)

    def _drain_leaving_nodes(self) -> None:
        """Ray's own notices of nodes that will go."""
        going = self._supervisor.draining_nodes()
        staying = {
            actor: u for actor, u in self._cluster_state.up().items() if actor not in self._cluster_state.leaving
        }
        waiting = {operation.arguments for operation in self._log.under_way() if operation.kind == "drain"}
        for node in sorted({u.address.node for u in staying.values()} & going):
            # One that failed fails again, as long as there are the same actors.
            if (node,) in waiting or self._drained_last.get(node) == frozenset(staying):
                continue
            try:
                self._log.order("drain", reason="Ray says that the node will go", arguments=(node,))
            except Exhausted as exc:
                logger.warning("node %s is not drained yet: %s", node, exc)
                return
            self._drained_last[node] = frozenset(staying)

    # -- what is decided --

    def _resize(self) -> None:
        settings = self._settings.size
        if settings is None or any(operation.kind in SIZES for operation in self._log.under_way()):
            return
        pressure = self._reports.pressure()
        seen = SizeObservation(
            now_s=self._clock(),
            actors=len(self._sizing.staying()),
            busy_share=pressure.busy_share,
            queue_s=pressure.queue_s,
            needed=self._sizing.needed,
        )
        wanted, why, self._size_state = decide_size(seen, self._size_state, settings)
        if wanted != seen.actors:
            self._log.order("scale", reason=why, arguments=(str(wanted),))
            self._rounds.wake()

    def _evict_idle(self) -> None:
        """Unloads experts that nobody has wanted for long."""
        after_s = self._settings.scale_to_zero_after_s
        if not after_s:
            return
        since_s = self._clock() - after_s
        # Tokens that wait for an expert may not be reported yet when it is woken.
        self._woken_s = {expert: at_s for expert, at_s in self._woken_s.items() if at_s > since_s}
        idle = self._planner.idle_experts(after_s) - self._cluster_state.cold - self._woken_s.keys()
        if not idle:
            return
        target = {
            layer: tuple(r for r in self._cluster_state.replicas_of(layer) if r.expert not in idle)
            for layer in {expert.layer for expert in idle}
        }
        operation = self._log.begin("cool", reason=f"no token wanted {len(idle)} experts for {after_s:g} s")
        self._apply(operation.id, target)

    def _decide(self) -> None:
        observer = self._planner.observer
        if observer.covered_s < MIN_COVERED_S or not observer.load_LE.any():
            return
        seen = self._planner.seen()
        if not seen.names.actors or self._cluster_state.lost():
            return  # what is lost comes first, and changes the snapshot when it is back
        self._apply_decision("rebalance", seen, "")

    def _apply_decision(self, kind: str, seen: Seen, reason: str, *, urgent: bool = False) -> None:
        try:
            change = self._planner.decide(seen)
        except UserError as exc:
            logger.info("the policy has no answer: %s", exc)
            return
        if not change.target:
            return
        operation = self._log.begin(
            kind if change.moves else "reshare",
            reason="; ".join(filter(None, (reason, change.decision.reason))),
            balancedness_before=change.decision.balancedness_before,
            balancedness_predicted=change.decision.balancedness_after,
        )
        self._apply(operation.id, change.target, urgent=urgent)

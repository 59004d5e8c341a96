"""The thread that changes placement, size and weights: it restores lost experts, then carries out requested operations,
then applies the policy's decisions.

It makes one change at a time; an optional change gives way to lost experts between two layers. While a training run
holds the placement, every expert has one replica, and nothing moves.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass

from moecluster.controller.actors.interfaces import ActorSupervisor
from moecluster.controller.actors.strays import Strays
from moecluster.controller.context import ControllerContext
from moecluster.controller.operations.executor import OperationExecutor, experts_of
from moecluster.controller.operations.expert_actors import Sizing
from moecluster.controller.operations.node_drains import NodeDrains
from moecluster.controller.operations.periodic_thread import FAILED_INSIDE, PeriodicThread
from moecluster.controller.operations.weight_rollout import WeightUpdates
from moecluster.controller.rebalance.apply import Interrupted, PlacementApplier
from moecluster.controller.rebalance.decide import LayerReplicas, Planner
from moecluster.controller.rebalance.measure import BalanceMeter
from moecluster.controller.rebalance.observe import Seen, with_budget
from moecluster.controller.rebalance.recovery import Recovery
from moecluster.errors import MoeClusterError, Unavailable, UserError
from moecluster.placement.initial import all_experts
from moecluster.placement.scaling import SizeObservation, SizeSettings, SizeState, decide_size
from moecluster.types import ExpertId, Operation, OperationKind, OperationPhase, Replica

logger = logging.getLogger(__name__)

MIN_COVERED_S = 1.0  # the policy decides nothing on a shorter load window
# Kinds of operations that other parts of the controller end, so a bug in this thread does not fail them.
ENDED_BY_OTHERS = frozenset({OperationKind.RESTORE, OperationKind.SCALE_ROUTERS, OperationKind.UPDATE})


@dataclass(frozen=True, kw_only=True)
class ReconcilerSettings:
    """When the reconciler makes changes."""

    policy: str = "share"
    period_s: float = 2.0
    quiet_s: float = 0.0  # no decisions for so long after the start: routers that hold the placement must report first
    operation_timeout_s: float = 600.0
    scale_to_zero_after_s: float = 0.0  # 0: never
    report_age_s: float = 5.0  # of an actor: beyond that nothing is known of its load
    stray_s: float = 20.0  # an actor that does not belong to the cluster is ended after so long
    size: SizeSettings | None = None  # None: only requested operations change the size


class Reconciler:
    """Its thread runs from start to close."""

    def __init__(
        self,
        context: ControllerContext,
        settings: ReconcilerSettings,
        *,
        planner: Planner,
        recovery: Recovery,
        applier: PlacementApplier,
        sizing: Sizing,
        updates: WeightUpdates,
        supervisor: ActorSupervisor,
    ) -> None:
        self._settings = settings
        self._cluster_state = context.state
        self._leases = context.leases
        self._log = context.operations
        self._reports = context.reports
        self._clock = context.clock
        self._planner = planner
        self._recovery = recovery
        self._applier = applier
        self._sizing = sizing
        self._updates = updates
        self._started_s = self._clock()
        self._size_state = SizeState()
        self._first_tried_s: dict[str, float] = {}  # operation id -> time, until the operation ends
        self._activated_s: dict[ExpertId, float] = {}  # when experts were activated
        self._balance = BalanceMeter(context, planner)
        self._drains = NodeDrains(context, supervisor=supervisor)
        self._strays = Strays(context, supervisor=supervisor, after_s=settings.stray_s)
        self._executor = OperationExecutor(
            context, planner=planner, applier=applier, sizing=sizing, removed_nodes=self._drains.nodes
        )
        self._thread = PeriodicThread(
            "reconciler",
            self._run_once,
            period_s=lambda: settings.period_s,
            without_result="no change was made",
            on_bug=self._fail_all,
        )
        context.signals.wake.listen(self._thread.wake)

    @property
    def started_s(self) -> float:
        """When the thread started, by the controller's clock."""
        return self._started_s

    def start(self) -> None:
        self._started_s = self._clock()
        self._thread.start()

    def close(self) -> None:
        """Stops the thread. A successor finds the current operation unfinished."""
        self._thread.close()

    # -- the thread --

    def _run_once(self) -> None:
        """One round: recovers, reads the load, carries out requested operations, then applies the policy."""
        held = self._leases.any_hold() and (self._cluster_state.held or self._updates.make_room())
        if held and not self._cluster_state.held:
            self._ensure_one_replica_each()
        self._cluster_state.set_held(held)
        if not held and self._recovery.is_possible():
            self._restore_elsewhere()
        self._planner.read()  # takes seconds if a Prometheus server hangs
        self._balance.show()
        if held:
            return
        self._updates.check()
        self._drains.enqueue()
        if not self._carry_out_all():
            return
        self._strays.end()
        self._balance.measure_gains()
        if self._clock() - self._started_s >= self._settings.quiet_s:
            self._resize()
            self._evict()
            self._decide()

    def _fail_all(self) -> None:
        """Fails the operations in progress: a bug must not leave them unfinished forever."""
        for operation in self._log.under_way():
            if operation.phase is not OperationPhase.QUEUED and operation.kind not in ENDED_BY_OTHERS:
                self._log.update(operation.id, phase=OperationPhase.FAILED, detail=FAILED_INSIDE)

    def _carry_out_all(self) -> bool:
        """Carries out the queued operations, drains first. Returns False if one gave way to a recovery, or on close.

        While an operation waits for actors, later scale operations wait too, and all others continue.
        """
        waiting = False
        for operation in sorted(
            self._log.queued(self._executor.kinds), key=lambda o: o.kind is not OperationKind.DRAIN
        ):
            if self._thread.closed:
                return False
            if waiting and operation.kind is OperationKind.SCALE:
                continue
            try:
                ended = self._carry_out(operation)
            except Interrupted as exc:
                self._log.update(operation.id, phase=OperationPhase.QUEUED, detail=str(exc))
                self._thread.wake()
                return False
            waiting = waiting or not ended
        return True

    def _carry_out(self, operation: Operation) -> bool:
        """Returns False if the operation waits for actors and is queued again. Raises Interrupted if it gave way to a
        recovery."""
        self._first_tried_s.setdefault(operation.id, self._clock())
        self._log.update(operation.id, phase=OperationPhase.PREPARING, detail="")
        missing = self._missing()  # the operation may fail because of one that is back afterwards
        try:
            self._executor.carry_out(operation)
        except Interrupted:
            raise
        except MoeClusterError as exc:
            if self._is_worth_another_try(operation, exc, missing | self._missing()):
                self._log.update(operation.id, phase=OperationPhase.QUEUED, detail=f"waits: {exc}")
                return False
            logger.warning("%s failed: %s", operation.id, exc)
            self._executor.take_back(operation)
            self._log.update(operation.id, phase=OperationPhase.FAILED, detail=str(exc))
        else:
            is_drain = operation.kind is OperationKind.DRAIN  # its detail is what could not be moved in time
            self._finish(operation.id, self._log.get(operation.id).detail if is_drain else "")
            if operation.kind is OperationKind.ACTIVATE:
                self._activated_s |= dict.fromkeys(experts_of(operation), self._clock())
        self._first_tried_s.pop(operation.id)
        return True

    def _missing(self) -> set[str]:
        """Returns the actors that are not leaving and do not serve now."""
        return set(self._sizing.staying()) - self._cluster_state.up().keys()

    def _is_worth_another_try(self, operation: Operation, error: MoeClusterError, missing: Collection[str]) -> bool:
        """Whether to retry: scale and drain wait for actors that are starting or lost, up to operation_timeout_s."""
        if not operation.kind.waits_for_actors or self._thread.closed:
            return False
        tried_s = self._clock() - self._first_tried_s[operation.id]
        return tried_s < self._settings.operation_timeout_s and (isinstance(error, Unavailable) or bool(missing))

    def _apply(self, operation_id: str, target: LayerReplicas, *, urgent: bool = False) -> None:
        """Applies a target, and ends the operation as done or failed."""
        try:
            self._applier.apply(operation_id, target, urgent=urgent)
        except MoeClusterError as exc:
            self._log.update(operation_id, phase=OperationPhase.FAILED, detail=str(exc))
        else:
            self._finish(operation_id)

    def _finish(self, operation_id: str, detail: str = "") -> None:
        self._log.update(operation_id, phase=OperationPhase.DONE, detail=detail)
        self._balance.ended(operation_id)

    # -- required changes --

    def _restore_elsewhere(self) -> None:
        """Loads lost experts into free slots at once, instead of waiting until their actor is back."""
        lost = sorted(self._cluster_state.lost())
        names = ", ".join(map(str, lost[:4])) + (", ..." if len(lost) > 4 else "")
        with self._recovery.attempt():
            seen = with_budget(self._planner.seen(), 0.0)
            self._apply_decision(OperationKind.RESTORE, seen, f"{len(lost)} experts were lost ({names})", urgent=True)

    def _ensure_one_replica_each(self) -> None:
        """Gives every expert exactly one replica, as training needs."""
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
            operation = self._log.begin(OperationKind.HOLD, reason="a training run needs one replica of every expert")
            self._apply(operation.id, target, urgent=True)

    # -- decisions --

    def _resize(self) -> None:
        settings = self._settings.size
        if settings is None or any(operation.kind.waits_for_actors for operation in self._log.under_way()):
            return
        staying, now_s = self._sizing.staying(), self._clock()
        pressure = self._reports.pressure(staying, now_s=now_s, max_age_s=self._settings.report_age_s)
        seen = SizeObservation(
            now_s=now_s,
            actors=len(staying),
            busy_share=pressure.busy_share,
            queue_s=pressure.queue_s,
            needed=self._sizing.needed,
            silent=pressure.silent,
        )
        wanted, why, self._size_state = decide_size(seen, self._size_state, settings)
        if wanted != seen.actors:
            self._log.enqueue(OperationKind.SCALE, reason=why, arguments=(str(wanted),))
            self._thread.wake()

    def _evict(self) -> None:
        """Unloads experts that no token was routed to for scale_to_zero_after_s."""
        after_s = self._settings.scale_to_zero_after_s
        if not after_s:
            return
        since_s = self._clock() - after_s
        # Tokens that wait for an expert may not be reported yet when it is activated.
        self._activated_s = {expert: at_s for expert, at_s in self._activated_s.items() if at_s > since_s}
        idle = self._planner.idle_experts(after_s) - self._cluster_state.cold - self._activated_s.keys()
        if not idle:
            return
        target = {
            layer: tuple(r for r in self._cluster_state.replicas_of(layer) if r.expert not in idle)
            for layer in {expert.layer for expert in idle}
        }
        operation = self._log.begin(
            OperationKind.EVICT, reason=f"no token was routed to {len(idle)} experts for {after_s:g} s"
        )
        self._apply(operation.id, target)

    def _decide(self) -> None:
        observer = self._planner.observer
        if observer.covered_s < MIN_COVERED_S or not observer.load_LE.any():
            return
        seen = self._planner.seen()
        if not seen.names.actors or self._cluster_state.lost():
            return  # lost experts come first, and their return changes the observation
        self._apply_decision(OperationKind.REBALANCE, seen, "")

    def _apply_decision(self, kind: OperationKind, seen: Seen, reason: str, *, urgent: bool = False) -> None:
        try:
            change = self._planner.decide(seen)
        except UserError as exc:
            logger.info("the policy has no decision: %s", exc)
            return
        if not change.target:
            return
        operation = self._log.begin(
            kind if change.moves else OperationKind.RESHARE,
            reason="; ".join(filter(None, (reason, change.decision.reason))),
            balancedness_before=change.decision.balancedness_before,
            balancedness_predicted=change.decision.balancedness_after,
        )
        self._apply(operation.id, change.target, urgent=urgent)

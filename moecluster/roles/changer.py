"""The one thread that changes a cluster: what users ordered first, then what the policy decides, one at a time.

Lost experts go before all: an optional change gives way to them between two layers.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moecluster.errors import MoeClusterError, ResourceError, UserError
from moecluster.metrics import Metrics
from moecluster.placement.decision import Decision, Policy
from moecluster.placement.layout import added_R, balancedness_L
from moecluster.placement.naming import to_replicas
from moecluster.placement.policies import policy_named
from moecluster.placement.scaling import SizeObservation, SizeSettings, SizeState, decide_size
from moecluster.roles.actor_keeper import ActorSupervisor
from moecluster.roles.actor_reports import ActorReports
from moecluster.roles.leases import Leases
from moecluster.roles.mover import Interrupted, Mover
from moecluster.roles.observer import Observer, Seen, with_budget
from moecluster.roles.operation_log import OperationLog
from moecluster.roles.sizing import Sizing, number_of
from moecluster.roles.standing import Standing
from moecluster.types import ExpertId, Operation, OperationPhase, PlanPreview, Replica

logger = logging.getLogger(__name__)

ORDERED = frozenset({"scale", "drain", "place", "wake"})  # kinds that a successor goes on with
MIN_COVERED_S = 1.0  # a shorter look at the load decides nothing
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ChangerSettings:
    """When changes are made."""

    policy: str = "share"
    period_s: float = 2.0
    operation_timeout_s: float = 600.0
    scale_to_zero_after_s: float = 0.0  # 0: never
    size: SizeSettings | None = None  # None: the size is changed by orders alone


@dataclass(kw_only=True)
class _Memory:
    """What the thread remembers from one look to the next."""

    policy_state: Any
    size_state: SizeState = field(default_factory=SizeState)
    unmeasured: list[tuple[str, float]] = field(default_factory=list)  # operations, and when they ended


class Changer:
    """Begins with start, ends with close."""

    def __init__(
        self,
        settings: ChangerSettings,
        *,
        standing: Standing,
        leases: Leases,
        log: OperationLog,
        observer: Observer,
        mover: Mover,
        sizing: Sizing,
        supervisor: ActorSupervisor,
        reports: ActorReports,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._standing = standing
        self._leases = leases
        self._log = log
        self._observer = observer
        self._mover = mover
        self._sizing = sizing
        self._supervisor = supervisor
        self._reports = reports
        self._metrics = metrics
        self._clock = clock
        self._policy: Policy[Any] = policy_named(settings.policy)
        self._memory = _Memory(policy_state=self._policy.first_state())
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._looking = threading.Lock()  # held while the observer or the memory is used
        self._thread = threading.Thread(target=self._run, name="changer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """What is under way ends as an operation that a successor finds unfinished."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    def recovery_waits(self) -> bool:
        """Whether experts are lost that could be loaded on actors that are up."""
        return bool(self._standing.lost()) and self._has_free_slots()

    def preview(self, policy: str) -> PlanPreview:
        """What a policy would do now. Raises ConfigError for a policy that there is not."""
        asked = policy_named(policy or self._settings.policy)
        with self._looking:
            seen = self._observer.observe(self._clock())
            decision, _ = asked.decide(seen.observation, asked.first_state())
        before = {
            (r.expert, r.actor): r for rs in to_replicas(seen.observation.layout, seen.names).values() for r in rs
        }
        after = {(r.expert, r.actor): r for rs in to_replicas(decision.layout, seen.names).values() for r in rs}
        return PlanPreview(
            policy=asked.name,
            reason=decision.reason,
            balancedness_before=decision.balancedness_before,
            balancedness_after=decision.balancedness_after,
            moved_bytes=decision.moved_bytes,
            added=tuple(r for key, r in after.items() if key not in before),
            removed=tuple(r for key, r in before.items() if key not in after),
            changed_shares=sum(abs(after[k].share - before[k].share) > 1e-6 for k in after.keys() & before.keys()),
        )

    # -- the thread --

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self._settings.period_s)
            self._wake.clear()
            if self._closed.is_set():
                return
            try:
                self._look()
            except MoeClusterError as exc:
                logger.warning("no change was made: %s", exc)

    def _look(self) -> None:
        """One round: recover, read, carry out what was ordered, then what the policy decides."""
        held = self._leases.any_hold()
        self._standing.set_held(held)
        if not held and self.recovery_waits():
            self._restore_elsewhere()
        with self._looking:
            self._observer.read(self._clock())  # takes seconds if a Prometheus server hangs
        self._show_load()
        if held:
            return
        self._drain_leaving_nodes()
        while (operation := self._log.next_queued()) is not None and not self._closed.is_set():
            if not self._carry_out(operation):
                return
        self._measure_gains()
        self._resize()
        self._cool()
        self._decide()

    def _carry_out(self, operation: Operation) -> bool:
        """False if it gave way to a recovery: it is queued again."""
        self._log.update(operation.id, phase=OperationPhase.PREPARING)
        try:
            {
                "scale": self._scale,
                "drain": self._drain,
                "place": self._place,
                "wake": self._wake_experts,
            }[operation.kind](operation)
        except Interrupted as exc:
            self._log.update(operation.id, phase=OperationPhase.QUEUED, detail=str(exc))
            self._wake.set()
            return False
        except MoeClusterError as exc:
            logger.warning("%s failed: %s", operation.id, exc)
            self._log.update(operation.id, phase=OperationPhase.FAILED, detail=str(exc))
        else:
            self._finish(operation.id)
        return True

    def _finish(self, operation_id: str) -> None:
        self._log.update(operation_id, phase=OperationPhase.DONE, detail="")
        self._memory.unmeasured.append((operation_id, self._clock()))

    # -- what users order --

    def _scale(self, operation: Operation) -> None:
        """To a number of actors: new ones are started and filled, or those of the highest numbers emptied and ended."""
        wanted = int(operation.arguments[0])
        self._sizing.check_size(wanted, "scale")
        staying = self._sizing.staying()
        if wanted >= len(staying):
            new = self._sizing.new_names(wanted - len(staying))
            self._log.update(operation.id, detail=f"waiting for {', '.join(new)}" if new else "filling")
            self._sizing.add(new)
            self._sizing.wait_up(self._sizing.staying(), self._settings.operation_timeout_s, self._closed)
            self._fill(operation.id)
        else:
            self._standing.set_leaving({*self._standing.leaving, *staying[wanted:]})
        self._empty_leaving(operation.id)

    def _drain(self, operation: Operation) -> None:
        """Empties the actors of a node, after starting others elsewhere if the slots would not do."""
        target = operation.arguments[0]
        up = self._standing.up()
        leaving = [a for a in self._standing.actors if a == target or (a in up and up[a].address.node == target)]
        if not leaving:
            return  # done before
        self._standing.set_leaving({*self._standing.leaving, *leaving})
        try:
            missing = self._sizing.needed - len(self._sizing.staying())
            if missing > 0:
                new = self._sizing.new_names(missing)
                self._log.update(operation.id, detail=f"waiting for {', '.join(new)}")
                self._sizing.add(new, avoid_nodes=[target])
                self._sizing.wait_up(self._sizing.staying(), self._settings.operation_timeout_s, self._closed)
            self._empty_leaving(operation.id)
        except Interrupted:
            raise
        except MoeClusterError:
            self._standing.set_leaving(self._standing.leaving - set(leaving))
            raise

    def _place(self, operation: Operation) -> None:
        """An expert onto exactly these actors, with equal shares; onto none: cold until a token wants it."""
        layer, index = map(int, operation.arguments[0].split("/"))
        expert, actors = ExpertId(layer=layer, index=index), operation.arguments[1:]
        others = [r for r in self._standing.replicas_of(layer) if r.expert != expert]
        self._check_room(expert, actors, others)
        placed = [Replica(expert=expert, actor=actor, share=1 / len(actors)) for actor in actors]
        self._mover.apply(operation.id, {layer: tuple(sorted((*others, *placed), key=lambda r: (r.expert, r.actor)))})

    def _check_room(self, expert: ExpertId, actors: Collection[str], others: list[Replica]) -> None:
        up = self._standing.up()
        for actor in actors:
            if actor not in up or actor in self._standing.leaving:
                raise ResourceError(f"place {expert}: {actor} serves no experts now; {', '.join(sorted(up))} do")
            taken = sum(r.actor == actor for r in others)
            if taken >= self._observer.settings.slots_per_layer:
                raise ResourceError(
                    f"place {expert}: all {taken} slots of layer {expert.layer} on {actor} are taken; "
                    "name another actor, or raise controller.slots_per_layer"
                )

    def _wake_experts(self, operation: Operation) -> None:
        """Cold experts that a token wants are loaded where there is most room."""
        for name in operation.arguments:
            layer, index = map(int, name.split("/"))
            expert = ExpertId(layer=layer, index=index)
            if expert not in self._standing.cold:
                continue
            replicas = self._standing.replicas_of(layer)
            taken = {a: 0 for a in self._standing.up() if a not in self._standing.leaving}
            for r in replicas:
                if r.actor in taken:
                    taken[r.actor] += 1
            if not taken:
                raise ResourceError(f"expert {expert} cannot be loaded: no expert actor is up")
            actor = min(taken, key=lambda a: (taken[a], number_of(a)))
            placed = (*replicas, Replica(expert=expert, actor=actor))
            self._mover.apply(
                operation.id, {layer: tuple(sorted(placed, key=lambda r: (r.expert, r.actor)))}, urgent=True
            )

    # -- what is decided here --

    def _restore_elsewhere(self) -> None:
        """Loads lost experts into free slots at once, instead of waiting until their actor is back."""
        lost = self._standing.lost()
        seen = with_budget(self._seen(), 0.0)
        names = ", ".join(map(str, sorted(lost)[:4])) + (", ..." if len(lost) > 4 else "")
        self._apply_decision("restore", seen, f"{len(lost)} experts were lost ({names})", urgent=True)

    def _drain_leaving_nodes(self) -> None:
        """Ray's own notices of nodes that will go."""
        nodes = self._supervisor.draining_nodes()
        for node in {u.address.node for a, u in self._standing.up().items() if a not in self._standing.leaving} & nodes:
            self._log.order("drain", reason="Ray says that the node will go", arguments=(node,))

    def _resize(self) -> None:
        settings = self._settings.size
        if settings is None:
            return
        pressure = self._reports.pressure()
        seen = SizeObservation(
            now_s=self._clock(),
            actors=len(self._sizing.staying()),
            busy_share=pressure.busy_share,
            queue_s=pressure.queue_s,
            needed=self._sizing.needed,
        )
        wanted, why, self._memory.size_state = decide_size(seen, self._memory.size_state, settings)
        if wanted != seen.actors:
            operation = self._log.order("scale", reason=why, arguments=(str(wanted),))
            self._carry_out(operation)

    def _cool(self) -> None:
        """Unloads experts that nobody has wanted for long."""
        after_s = self._settings.scale_to_zero_after_s
        if not after_s:
            return
        with self._looking:
            idle = self._observer.idle_experts(after_s) - self._standing.cold
        if not idle:
            return
        target = {
            layer: tuple(r for r in self._standing.replicas_of(layer) if r.expert not in idle)
            for layer in {expert.layer for expert in idle}
        }
        operation = self._log.begin("cool", reason=f"no token wanted {len(idle)} experts for {after_s:g} s")
        self._apply(operation.id, target)

    def _decide(self) -> None:
        if self._observer.covered_s < MIN_COVERED_S or not self._observer.load_LE.any():
            return
        seen = self._seen()
        if not seen.names.actors or self._standing.lost():
            return  # what is lost comes first, and changes the picture when it is back
        self._apply_decision("rebalance", seen, "")

    def _seen(self) -> Seen:
        with self._looking:
            return self._observer.observe(self._clock())

    def _apply_decision(self, kind: str, seen: Seen, reason: str, *, urgent: bool = False) -> None:
        try:
            decision, self._memory.policy_state = self._policy.decide(seen.observation, self._memory.policy_state)
        except UserError as exc:
            logger.info("the policy %s has no answer: %s", self._policy.name, exc)
            return
        before, target = self._changes(seen, decision)
        if before == target:
            return
        moves = added_R(seen.observation.layout, decision.layout).any() or (
            decision.layout.num_replicas != seen.observation.layout.num_replicas
        )
        operation = self._log.begin(
            kind if moves else "reshare",
            reason="; ".join(filter(None, (reason, decision.reason))),
            balancedness_before=decision.balancedness_before,
            balancedness_predicted=decision.balancedness_after,
        )
        self._apply(operation.id, target, urgent=urgent)

    def _changes(
        self, seen: Seen, decision: Decision
    ) -> tuple[dict[int, tuple[Replica, ...]], dict[int, tuple[Replica, ...]]]:
        """Layer -> replicas, before and after, of the layers that change."""
        before = to_replicas(seen.observation.layout, seen.names)
        after = to_replicas(decision.layout, seen.names)
        changed = [layer for layer in after if after[layer] != before[layer]]
        return {layer: before[layer] for layer in changed}, {layer: after[layer] for layer in changed}

    def _apply(self, operation_id: str, target: dict[int, tuple[Replica, ...]], *, urgent: bool = False) -> None:
        """Carries out what was decided here; it ends, well or not."""
        try:
            self._mover.apply(operation_id, target, urgent=urgent)
        except MoeClusterError as exc:
            self._log.update(operation_id, phase=OperationPhase.FAILED, detail=str(exc))
        else:
            self._finish(operation_id)

    def _fill(self, operation_id: str) -> None:
        """Spreads the experts over all actors that stay."""
        seen = with_budget(self._seen(), np.inf)
        decision, self._memory.policy_state = self._policy.decide(seen.observation, self._memory.policy_state)
        self._log.update(
            operation_id,
            balancedness_before=decision.balancedness_before,
            balancedness_predicted=decision.balancedness_after,
        )
        self._mover.apply(operation_id, self._changes(seen, decision)[1])

    def _empty_leaving(self, operation_id: str) -> None:
        """Moves everything off the actors that leave, then ends them."""
        leaving = sorted(self._standing.leaving)
        if not leaving:
            return
        self._sizing.check_size(len(self._sizing.staying()), "drain")
        self._log.update(operation_id, detail=f"emptying {', '.join(leaving)}")
        self._fill(operation_id)
        left = [
            str(r.expert) for r in self._standing.replicas() if r.actor in leaving and r.actor in self._standing.up()
        ]
        if left:
            raise ResourceError(f"{', '.join(leaving)} still hold {len(left)} experts ({left[0]}, ...)")
        self._sizing.remove(leaving)

    # -- what is shown --

    def _measure_gains(self) -> None:
        """Fills in what operations have gained, once a window has passed over them."""
        now_s, window_s = self._clock(), self._observer.settings.window_s
        ready = [operation for operation, ended_s in self._memory.unmeasured if now_s - ended_s >= window_s]
        if not ready:
            return
        self._memory.unmeasured = [(o, s) for o, s in self._memory.unmeasured if o not in ready]
        seen = self._seen().observation
        if not self._observer.load_LE.any():
            return
        measured = float(balancedness_L(seen.layout, seen.load_LE, seen.fleet).mean())
        for operation in ready:
            self._log.update(operation, balancedness_measured=measured)

    def _show_load(self) -> None:
        if not self._observer.load_LE.any() or not self._standing.up():
            return
        seen = self._seen()
        self._metrics.set_actor_speeds(
            dict(zip(seen.names.actors, seen.observation.fleet.speed_A.tolist(), strict=True))
        )
        layers = balancedness_L(seen.observation.layout, seen.observation.load_LE, seen.observation.fleet)
        for layer, balancedness in zip(seen.names.layers, layers.tolist(), strict=True):
            self._metrics.set_layer_balancedness(layer, balancedness)

    def _has_free_slots(self) -> bool:
        up = [a for a in self._standing.up() if a not in self._standing.leaving]
        replicas = self._standing.replicas()
        for layer in {expert.layer for expert in self._standing.lost()}:
            standing = sum(r.expert.layer == layer and r.actor in up for r in replicas)
            if standing < len(up) * self._observer.settings.slots_per_layer:
                return True
        return False

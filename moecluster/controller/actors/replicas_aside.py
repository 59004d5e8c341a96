"""Replicas that routers report for NaN or infinity: each is set aside and reloaded once, and stays aside if that does
not help."""

import logging
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from moecluster.controller.context import ControllerContext
from moecluster.types import NO_PLACEMENT, ExpertId, OperationKind, OperationPhase, PlacementNumber, ReplicaAside

logger = logging.getLogger(__name__)

RELOADING = "reloading"  # gets no rows if the expert has another replica
RELOADED = "reloaded"  # serves again
NOT_YET = PlacementNumber(term=sys.maxsize, generation=0)  # later than any placement
SICK = "sick"  # is not reloaded again, and gets no rows if the expert has another replica


@dataclass(frozen=True, kw_only=True)
class _Entry:
    incarnation: str  # of the actor: a new incarnation has reloaded everything
    weight_version: int  # that was served: an update replaces the replica
    shown: ReplicaAside
    operation_id: str = ""
    placement: PlacementNumber = NO_PLACEMENT  # with the replica again; reports by older ones predate the reload


class ReplicasAside:
    """Thread-safe. An actor's monitor carries out the reloads."""

    def __init__(self, context: ControllerContext, *, check: Callable[[str], None]) -> None:
        """check: wakes an actor's monitor."""
        self._cluster_state = context.state
        self._log = context.operations
        self._check = check
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, ExpertId], _Entry] = {}

    def report(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """A router received NaN or infinity from a replica, not due to its rows. placement: that it routed by."""
        up = self._cluster_state.up().get(actor)
        if up is None or up.address.incarnation != incarnation or expert not in self._cluster_state.assigned(actor):
            return  # another incarnation of the actor, or the expert was moved
        with self._lock:
            self._drop_old()
            before = self._entries.get((actor, expert))
            if before is not None and before.shown.state == RELOADED and placement < before.placement:
                return
            if before is not None and before.shown.state != RELOADED:
                shown = replace(before.shown, reports=before.shown.reports + 1)
                self._entries[actor, expert] = replace(before, shown=shown)
                return
        again = before is not None
        reason = f"expert {expert} of {actor} answers NaN or infinity"
        operation = self._log.begin(OperationKind.RESTORE, reason=reason, arguments=(actor, str(expert)))
        state = SICK if again else RELOADING  # at once: a monitor may look at any moment
        shown = ReplicaAside(actor=actor, expert=expert, state=state, problem=reason, reports=1)
        entry = _Entry(
            incarnation=incarnation,
            weight_version=self._cluster_state.versions.weight_version,
            shown=shown,
            operation_id=operation.id,
        )
        with self._lock:
            self._entries[actor, expert] = entry
        logger.error("%s; it is set aside%s", reason, "" if again else ", and reloaded")
        if again:
            why = f"even after a reload from {self._cluster_state.versions.checkpoint}"
            self._give_up(actor, [expert], f"{reason}, {why}")
        self._publish()
        self._check(actor)

    def to_reload(self, actor: str) -> frozenset[ExpertId]:
        """Returns the experts to reload; none while training runs hold the placement."""
        if not self._entries or self._cluster_state.held:
            return frozenset()
        with self._lock:
            self._drop_old()
            return frozenset(e for (of, e), entry in self._entries.items() if of == actor and _reloads(entry))

    def reloaded(self, actor: str, experts: Collection[ExpertId], loaded_bytes: int) -> None:
        """The experts were reloaded: routers may use them again, unless they were given up meanwhile."""
        with self._lock:
            experts = [e for e in experts if (actor, e) in self._entries and _reloads(self._entries[actor, e])]
        self._change(actor, experts, state=RELOADED, problem="", placement=NOT_YET)
        number = self._publish()
        with self._lock:
            ended = [(key, self._entries[key]) for key in ((actor, e) for e in experts) if key in self._entries]
            self._entries |= {key: replace(entry, placement=number) for key, entry in ended}
        for _, entry in ended:
            self._log.count_moved(entry.operation_id, loaded_bytes=loaded_bytes // len(ended), added=0, removed=0)
            self._log.update(entry.operation_id, phase=OperationPhase.DONE, detail="reloaded")

    def reload_failed(self, actor: str, experts: Collection[ExpertId], why: str) -> None:
        """The experts cannot be reloaded, and are not tried again."""
        self._give_up(actor, experts, f"it cannot be reloaded: {why}")

    def states(self) -> tuple[ReplicaAside, ...]:
        """Returns all reported replicas, sorted by actor and expert."""
        with self._lock:
            self._drop_old()
            return tuple(entry.shown for _, entry in sorted(self._entries.items()))

    # -- internal --

    def _give_up(self, actor: str, experts: Collection[ExpertId], problem: str) -> None:
        for operation_id in self._change(actor, experts, state=SICK, problem=problem):
            detail = f"{problem}; it stays set aside: update to a sound checkpoint, or end the actor"
            self._log.update(operation_id, phase=OperationPhase.FAILED, detail=detail)

    def _change(
        self,
        actor: str,
        experts: Collection[ExpertId],
        *,
        state: str,
        problem: str,
        placement: PlacementNumber = NO_PLACEMENT,
    ) -> list[str]:
        """Changes these entries; returns their operations' ids."""
        with self._lock:
            changed = [(actor, expert) for expert in experts if (actor, expert) in self._entries]
            for key in changed:
                entry = self._entries[key]
                shown = replace(entry.shown, state=state, problem=problem)
                self._entries[key] = replace(entry, shown=shown, placement=placement)
            return [self._entries[key].operation_id for key in changed]

    def _publish(self) -> PlacementNumber:
        with self._lock:
            aside = frozenset(key for key, entry in self._entries.items() if entry.shown.state != RELOADED)
        return self._cluster_state.set_aside(aside)

    def _drop_old(self) -> None:
        """Forgets replicas of an older incarnation or of weights no longer served, and experts that were moved. Under
        the lock."""
        up, version = self._cluster_state.up(), self._cluster_state.versions.weight_version
        incarnations = {actor: found.address.incarnation for actor, found in up.items()}
        self._entries = {
            (actor, expert): entry
            for (actor, expert), entry in self._entries.items()
            if entry.weight_version == version
            and incarnations.get(actor, entry.incarnation) == entry.incarnation
            and expert in self._cluster_state.assigned(actor)
        }


def _reloads(entry: _Entry) -> bool:
    return entry.shown.state == RELOADING

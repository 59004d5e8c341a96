"""Replicas that answer NaN or infinity, as routers report: loaded anew once, and set aside while that does not help."""

import logging
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from moecluster.controller.context import ControllerContext
from moecluster.types import NO_PLACEMENT, ExpertId, OperationKind, OperationPhase, PlacementNumber, ReplicaAside

logger = logging.getLogger(__name__)

RELOADING = "reloading"  # gets no rows if the expert has another replica
RELOADED = "reloaded"  # is asked again
NOT_YET = PlacementNumber(term=sys.maxsize, generation=0)  # later than any placement
SICK = "sick"  # is loaded anew no more, and gets no rows if the expert has another replica


@dataclass(frozen=True, kw_only=True)
class _Entry:
    incarnation: str  # of the actor: another incarnation of it has loaded everything anew
    weight_version: int  # that is served: an update brings another replica
    shown: ReplicaAside
    operation_id: str = ""
    placement: PlacementNumber = NO_PLACEMENT  # that has the replica again; reports of older ones are of before


class ReplicasAside:
    """Thread-safe. An actor's monitor carries out the loads."""

    def __init__(self, context: ControllerContext, *, check: Callable[[str], None]) -> None:
        """look: wakes an actor's monitor."""
        self._cluster_state = context.state
        self._log = context.operations
        self._check = check
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, ExpertId], _Entry] = {}

    def report(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """A router had NaN or infinity of a replica for rows that are not to blame. placement: that it routed by."""
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
        reason = f"expert {expert} of {actor} answers NaN or infinity"
        operation = self._log.begin(OperationKind.RESTORE, reason=reason, arguments=(actor, str(expert)))
        shown = ReplicaAside(actor=actor, expert=expert, state=RELOADING, problem=reason, reports=1)
        entry = _Entry(
            incarnation=incarnation,
            weight_version=self._cluster_state.versions.weight_version,
            shown=shown,
            operation_id=operation.id,
        )
        with self._lock:
            self._entries[actor, expert] = entry
        logger.error("%s; it is set aside%s", reason, "" if before is not None else ", and loaded anew")
        if before is not None:
            why = f"also after it was loaded anew from {self._cluster_state.versions.checkpoint}"
            self._give_up(actor, [expert], f"{reason}, {why}")
        self._publish()
        self._check(actor)

    def to_reload(self, actor: str) -> frozenset[ExpertId]:
        """What is to be loaded anew; nothing while training runs hold the experts as they are."""
        if not self._entries or self._cluster_state.held:
            return frozenset()
        with self._lock:
            self._drop_old()
            return frozenset(e for (of, e), entry in self._entries.items() if of == actor and _reloads(entry))

    def reloaded(self, actor: str, experts: Collection[ExpertId], loaded_bytes: int) -> None:
        """They were: routers may ask for them again."""
        self._change(actor, experts, state=RELOADED, problem="", placement=NOT_YET)
        number = self._publish()
        with self._lock:
            ended = [(key, self._entries[key]) for key in ((actor, e) for e in experts) if key in self._entries]
            self._entries |= {key: replace(entry, placement=number) for key, entry in ended}
        for _, entry in ended:
            self._log.count_moved(entry.operation_id, loaded_bytes=loaded_bytes // len(ended), added=0, removed=0)
            self._log.update(entry.operation_id, phase=OperationPhase.DONE, detail="loaded anew")

    def reload_failed(self, actor: str, experts: Collection[ExpertId], why: str) -> None:
        """They were not, and are not tried again."""
        self._give_up(actor, experts, f"it cannot be loaded anew: {why}")

    def states(self) -> tuple[ReplicaAside, ...]:
        """What is known, by actor and expert."""
        with self._lock:
            self._drop_old()
            return tuple(entry.shown for _, entry in sorted(self._entries.items()))

    # -- inside --

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
        """Returns the operations of what was changed."""
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
        """Forgets replicas of another incarnation of an actor, or of weights that are not served any more. Under the
        lock."""
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

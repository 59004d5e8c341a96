"""Replaces weights while serving: a new version is prepared beside the old one, published, and the old one dropped.

1. Every actor loads the new version of the experts that it holds (by its monitor), and every router its trunk.
2. The version is published: routers begin new requests with it, and finish those that run with the old one.
3. The old version is dropped when no request uses it any longer. The requests of a lost router count for a while:
   another router, which may keep the old version as long as it is in use, continues them.

Nothing here waits: each check goes as far as it can, and other work is done between two checks. The weight versions
show how far an update is, so a successor continues it.
"""

import logging
from dataclasses import dataclass

from moecluster.controller.context import ControllerContext
from moecluster.controller.operations.periodic_thread import FAILED_INSIDE
from moecluster.controller.state.router_leases import Lease
from moecluster.errors import DeadlineExceeded, MoeClusterError, OperationFailed, UserError
from moecluster.types import NO_PLACEMENT, Operation, OperationKind, OperationPhase, PlacementNumber

logger = logging.getLogger(__name__)

FIRST_TERM = 1  # of a controller without a predecessor
NAMED = 4  # actors or routers that a detail names


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """How long an update may take."""

    prepare_timeout_s: float = 600.0  # until all actors and routers have loaded the new version
    old_requests_timeout_s: float = 3600.0  # for requests begun with the old version; as long as the longest one
    # How long a router with an expired lease counts: loading may delay renewals, and its requests continue elsewhere.
    router_grace_s: float = 30.0


class WeightUpdates:
    """Used by one thread at a time."""

    def __init__(self, context: ControllerContext, settings: UpdateSettings) -> None:
        self._settings = settings
        self._cluster_state = context.state
        self._leases = context.leases
        self._log = context.operations
        self._reports = context.reports
        self._clock = context.clock
        self._observed: tuple[int, int] | None = None  # (version, published) of _since_s and _published
        self._since_s = 0.0  # when this controller first saw that
        self._published = NO_PLACEMENT  # number of the placement at that time

    def check(self) -> None:
        """Takes the current update, or the first that is queued, as far as it goes now."""
        operation = self._under_way()
        try:
            if operation is not None:
                self._go_on(operation)
            else:
                self._clean_up()
        except MoeClusterError as exc:
            assert operation is not None
            logger.warning("%s failed: %s", operation.id, exc)
            self._give_up(operation, str(exc))
        except Exception:
            if operation is not None:  # a bug must not leave it unfinished forever
                self._give_up(operation, FAILED_INSIDE)
            raise

    def make_room(self) -> bool:
        """Prepares for a training run that wants to hold the placement. Returns True once only one version is left.

        An update that is not published is given up; a published one ends first.
        """
        operation = self._under_way()
        if self._cluster_state.versions.next is not None:
            self._cluster_state.drop_other_versions()
            if operation is not None:
                detail = "a training run started before the new version was loaded everywhere; update again after it"
                self._log.update(operation.id, phase=OperationPhase.FAILED, detail=detail)
        return len(self._cluster_state.versions.all) == 1

    def _give_up(self, operation: Operation, why: str) -> None:
        """Fails the operation. A published version stays, and the old one as long as it is in use."""
        if self._cluster_state.versions.next is not None:
            self._cluster_state.drop_other_versions()
        self._log.update(operation.id, phase=OperationPhase.FAILED, detail=why)

    def _under_way(self) -> Operation | None:
        return next((o for o in self._log.under_way() if o.kind is OperationKind.UPDATE), None)

    def _go_on(self, operation: Operation) -> None:
        """Takes the update further. Raises if it fails before it is published."""
        directory, following = operation.arguments[0], self._cluster_state.versions.next
        if following is not None and following.checkpoint != directory:  # another update left it
            self._cluster_state.drop_other_versions()
        elif following is not None:
            self._prepare(operation)
        elif len(self._cluster_state.versions.all) > 1:
            self._end_requests(operation if self._cluster_state.versions.checkpoint == directory else None)
        elif self._cluster_state.versions.checkpoint == directory:
            self._end(operation)
        else:
            self._cluster_state.begin_version(directory)
            self._prepare(operation)

    def _prepare(self, operation: Operation) -> None:
        version = self._cluster_state.versions.next
        assert version is not None
        since_s, published = self._seen(version.version, published=False)
        actors = self._unprepared()
        failures = self._reports.not_prepared(version.version)
        for actor, error in failures.items():
            if isinstance(error, UserError):  # a retry does not help
                raise OperationFailed(f"{actor} cannot load the new version: {error}")
        routers = []
        for name, lease in self._routers().items():
            if lease.applied < published or lease.state.ready_weight_version < version.version:
                routers.append(name)
            if lease.state.failed_weight_version == version.version:
                raise OperationFailed(f"{name} cannot load the trunk of the new version: {lease.state.problem}")
        all_ready = not actors and not routers and self._leases.settled()
        if all_ready and self._cluster_state.publish_version() is not None:
            self._end_requests(operation)
            return
        if self._clock() - since_s >= self._settings.prepare_timeout_s:
            why = f": {next(iter(failures.values()))}" if failures else ""
            raise DeadlineExceeded(
                f"{_names([*actors, *routers])} did not load the new version within "
                f"{self._settings.prepare_timeout_s:g} s{why}"
            )
        self._report(
            operation, OperationPhase.PREPARING, f"version {version.version} is loaded by all but ", actors, routers
        )

    def _unprepared(self) -> list[str]:
        """Returns the actors that block publishing: those that are up without the new version, and lost ones with
        experts that no other actor serves: the new version may have been too large for them."""
        lost = self._cluster_state.lost()
        away = set(self._cluster_state.actors) - self._cluster_state.up().keys()
        return sorted(
            {
                *self._cluster_state.unprepared(),
                *(actor for actor in away if self._cluster_state.assigned(actor) & lost),
            }
        )

    def _end_requests(self, operation: Operation | None) -> None:
        """The new version is published: drops the old one when no request uses it any longer."""
        version = self._cluster_state.versions.weight_version
        since_s, published = self._seen(version, published=True)
        if not self._leases.settled() or self._may_miss_lost_routers():
            return  # a successor does not know yet which requests run
        leases = (*self._routers().values(), *self._leases.heard_before(self._settings.router_grace_s))
        writing = sorted(
            {
                lease.state.router
                for lease in leases
                if lease.applied < published or lease.state.oldest_weight_version < version
            }
        )
        if writing and self._clock() - since_s < self._settings.old_requests_timeout_s:
            if operation is not None:
                begun = f"new requests use version {version}; requests with older weights still run on "
                self._report(operation, OperationPhase.COMMITTING, begun, writing)
            return
        if writing:
            logger.warning("requests of %s outlived their weights: they continue with the new ones", _names(writing))
        self._cluster_state.drop_other_versions()
        if operation is not None:
            self._end(operation)

    def _end(self, operation: Operation) -> None:
        """Only the new version is left: the update is done when no actor that is up holds another one."""
        version = self._cluster_state.versions.weight_version
        holding = [a for a in self._reports.with_other_versions() if a in self._cluster_state.up()]
        if holding:
            self._report(
                operation,
                OperationPhase.COMMITTING,
                f"version {version} is in use; the old one is being dropped by ",
                holding,
            )
            return
        detail = f"version {version}: {self._cluster_state.versions.checkpoint}"
        self._log.update(operation.id, phase=OperationPhase.DONE, detail=detail)

    def _clean_up(self) -> None:
        """Drops the versions of an update that is no longer in the log."""
        if self._cluster_state.versions.next is not None:
            self._cluster_state.drop_other_versions()
        elif len(self._cluster_state.versions.all) > 1:
            self._end_requests(None)

    def _may_miss_lost_routers(self) -> bool:
        """Whether routers may have been lost with their requests shortly before this controller took over, or look for
        it still: they find it only after it has started, which may take minutes."""
        is_successor = self._cluster_state.number.term > FIRST_TERM
        return is_successor and not self._leases.settled(self._settings.router_grace_s)

    def _routers(self) -> dict[str, Lease]:
        """The last leases of routers that serve requests; other routers report no weight version."""
        heard = self._leases.heard(self._settings.router_grace_s)
        return {name: lease for name, lease in sorted(heard.items()) if lease.state.weight_version}

    def _seen(self, version: int, *, published: bool) -> tuple[float, PlacementNumber]:
        """Returns when this controller first saw the version in that state, and the placement number of that time."""
        if self._observed != (version, published):
            self._observed = (version, published)
            self._since_s, self._published = self._clock(), self._cluster_state.number
        return self._since_s, self._published

    def _report(self, operation: Operation, phase: OperationPhase, what: str, *names: list[str]) -> None:
        everybody = [name for group in names for name in group] or ["those that have not reported yet"]
        detail = what + _names(everybody)
        if (operation.phase, operation.detail) != (phase, detail):
            self._log.update(operation.id, phase=phase, detail=detail)


def _names(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

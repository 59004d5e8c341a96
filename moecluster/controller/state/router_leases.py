"""Which routers are there, what they have applied, what they say of themselves, and whether one holds the placement."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from moecluster.types import PlacementNumber, RouterState

KEPT_S = 3600.0  # how long it is known of a router that it was there


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A router that is there."""

    expires_s: float
    applied: PlacementNumber  # of the placement that it routes by
    state: RouterState  # as it last told
    hold: bool = False  # it trains: the placement must stay


class Leases:
    """A router counts for lease_s after each renewal. Thread-safe.

    A new incarnation of a router takes the place of the old one at once; what the old one did is remembered as if its
    lease had run out.
    """

    def __init__(self, lease_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._former: tuple[Lease, ...] = ()  # of incarnations that ended before their leases did
        self._changed = threading.Condition()
        self._opened_s: float | None = None  # when this controller published its first placement

    def opened(self) -> None:
        """The first placement of this controller is published now."""
        self._opened_s = self._clock()

    def settled(self) -> bool:
        """Whether every router that holds a lease had the time to take a placement of this controller."""
        return self._opened_s is not None and self._clock() - self._opened_s >= self._lease_s

    def renew(
        self, router: str, applied: PlacementNumber, *, hold: bool = False, state: RouterState | None = None
    ) -> bool:
        """The router counts from now on, and stands as it says. True if it begins or ceases to hold the placement, or
        uses or can use other weight versions than before.
        """
        with self._changed:
            before = self._unexpired().get(router)
            lease = Lease(
                expires_s=self._clock() + self._lease_s,
                applied=applied,
                state=state or RouterState(router=router),
                hold=hold,
            )
            last = self._leases.get(router)
            if last is not None and _is_other_incarnation(last.state, lease.state):
                self._former = (*self._former, last)
            self._leases[router] = lease
            self._changed.notify_all()
            return hold != (before is not None and before.hold) or _weights(lease) != _weights(before)

    def current(self) -> dict[str, Lease]:
        """Routers that hold a lease now."""
        with self._changed:
            return dict(self._unexpired())

    def heard(self, grace_s: float) -> dict[str, Lease]:
        """Routers that hold a lease, or did not longer ago than that."""
        with self._changed:
            since_s = self._clock() - min(grace_s, KEPT_S)
            return {router: lease for router, lease in self._leases.items() if lease.expires_s > since_s}

    def heard_before(self, grace_s: float) -> tuple[Lease, ...]:
        """As `heard`: the last leases of incarnations that others have followed, or that were ended."""
        with self._changed:
            now_s = self._clock()
            self._former = tuple(lease for lease in self._former if lease.expires_s > now_s - KEPT_S)
            return tuple(lease for lease in self._former if lease.expires_s > now_s - min(grace_s, KEPT_S))

    def states(self) -> dict[str, RouterState]:
        """What the routers that hold a lease now say of themselves, by their names, which are sorted."""
        return {router: lease.state for router, lease in sorted(self.current().items())}

    def drop(self, router: str) -> None:
        """The router was ended: it is waited for no more."""
        with self._changed:
            last = self._leases.pop(router, None)
            self._former += (last,) if last is not None and last.state.weight_version else ()
            self._changed.notify_all()

    def any_hold(self) -> bool:
        """Whether a router holds the placement as it is."""
        return any(lease.hold for lease in self.current().values())

    def wait_applied(self, number: PlacementNumber, timeout_s: float) -> bool:
        """Waits until every router that has a lease routes by the placement. False after the timeout."""
        deadline_s = self._clock() + timeout_s
        with self._changed:
            while behind := [lease for lease in self._unexpired().values() if lease.applied < number]:
                now_s = self._clock()
                if now_s >= deadline_s:
                    return False
                self._changed.wait(max(min(deadline_s, *(lease.expires_s for lease in behind)) - now_s, 1e-3))
            return True

    def _unexpired(self) -> dict[str, Lease]:
        now_s = self._clock()
        self._leases = {router: lease for router, lease in self._leases.items() if lease.expires_s > now_s - KEPT_S}
        return {router: lease for router, lease in self._leases.items() if lease.expires_s > now_s}


def _is_other_incarnation(before: RouterState, now: RouterState) -> bool:
    """A router that has just started knows of no version, and listens elsewhere."""
    moved = before.address and now.address and before.address != now.address
    return bool(before.weight_version and (moved or not now.weight_version))


def _weights(lease: Lease | None) -> tuple[int, ...]:
    """What a router says of weight versions."""
    if lease is None:
        return (0, 0, 0, 0)
    state = lease.state
    return (
        state.weight_version,
        state.oldest_weight_version,
        state.ready_weight_version,
        state.failed_weight_version,
    )

"""Router leases: which routers are alive, the placement that each has applied, its reported state, and its hold."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from moecluster.types import PlacementNumber, RouterState

KEPT_S = 3600.0  # how long an expired lease is remembered


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A router's lease, as of its last renewal."""

    expires_s: float
    applied: PlacementNumber  # number of the placement that it routes by
    state: RouterState  # as last reported
    hold: bool = False  # it trains: the placement must not change


class Leases:
    """The leases of all routers, each valid for lease_s after a renewal. Thread-safe.

    A new incarnation of a router replaces the old one at once; the old one's lease is remembered apart.
    """

    def __init__(self, lease_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._former: tuple[Lease, ...] = ()  # of incarnations that were replaced or ended before their leases expired
        self._changed = threading.Condition()
        self._opened_s: float | None = None  # when this controller published its first placement

    def opened(self) -> None:
        """Notes that this controller has published its first placement."""
        self._opened_s = self._clock()

    def settled(self, at_least_s: float = 0.0) -> bool:
        """Whether every router with a lease had the time to apply a placement of this controller: lease_s, or
        at_least_s if that is longer."""
        return self._opened_s is not None and self._clock() - self._opened_s >= max(self._lease_s, at_least_s)

    def renew(
        self, router: str, applied: PlacementNumber, *, hold: bool = False, state: RouterState | None = None
    ) -> bool:
        """Renews a router's lease with its reported state. Returns True if it starts or stops holding the placement, or
        reports other weight versions than before.
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
        """Returns the leases that have not expired, by router."""
        with self._changed:
            return dict(self._unexpired())

    def heard(self, grace_s: float) -> dict[str, Lease]:
        """Returns the leases that have not expired, or expired within the last grace_s (at most KEPT_S), by router."""
        with self._changed:
            since_s = self._clock() - min(grace_s, KEPT_S)
            return {router: lease for router, lease in self._leases.items() if lease.expires_s > since_s}

    def heard_before(self, grace_s: float) -> tuple[Lease, ...]:
        """Like `heard`, for incarnations that were replaced or ended: their last leases."""
        with self._changed:
            now_s = self._clock()
            self._former = tuple(lease for lease in self._former if lease.expires_s > now_s - KEPT_S)
            return tuple(lease for lease in self._former if lease.expires_s > now_s - min(grace_s, KEPT_S))

    def states(self) -> dict[str, RouterState]:
        """Returns the reported state of every router with a lease, sorted by name."""
        return {router: lease.state for router, lease in sorted(self.current().items())}

    def drop(self, router: str) -> None:
        """The router was ended: nothing waits for it any longer."""
        with self._changed:
            last = self._leases.pop(router, None)
            self._former += (last,) if last is not None and last.state.weight_version else ()
            self._changed.notify_all()

    def any_hold(self) -> bool:
        """Whether a router with a lease holds the placement."""
        return bool(self.holding())

    def holding(self) -> frozenset[str]:
        """Returns the routers with a lease that hold the placement."""
        return frozenset(router for router, lease in self.current().items() if lease.hold)

    def wait_applied(self, number: PlacementNumber, timeout_s: float) -> bool:
        """Waits until every router with a lease has applied this placement or a newer one. Returns False after the
        timeout."""
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
    """A restarted router reports another address, or no weight version yet."""
    moved = before.address and now.address and before.address != now.address
    return bool(before.weight_version and (moved or not now.weight_version))


def _weights(lease: Lease | None) -> tuple[int, ...]:
    """The weight versions that a router reports."""
    if lease is None:
        return (0, 0, 0, 0)
    state = lease.state
    return (
        state.weight_version,
        state.oldest_weight_version,
        state.ready_weight_version,
        state.failed_weight_version,
    )

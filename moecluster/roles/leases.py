"""Which routers are there, what they have applied, and whether one of them holds the placement."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from moecluster.types import RouterState


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A router that is there."""

    expires_s: float
    applied: tuple[int, int]  # (term, generation) of the placement that it routes by
    state: RouterState  # as the router said of itself
    hold: bool = False  # it trains: the placement must stay


class Leases:
    """A router counts for lease_s after each renewal. Thread-safe."""

    def __init__(self, lease_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._changed = threading.Condition()

    def renew(self, router: str, applied: tuple[int, int], *, hold: bool, state: RouterState | None = None) -> bool:
        """The router counts from now on. True if it begins or ceases to hold the placement, or uses or can use other
        weight versions than before."""
        state = state or RouterState(router=router)
        with self._changed:
            before = self._standing().get(router)
            lease = Lease(expires_s=self._clock() + self._lease_s, applied=applied, state=state, hold=hold)
            self._leases[router] = lease
            self._changed.notify_all()
            return hold != (before is not None and before.hold) or _weights(lease) != _weights(before)

    def standing(self) -> dict[str, Lease]:
        """Routers that hold a lease now."""
        with self._changed:
            return dict(self._standing())

    def any_hold(self) -> bool:
        """Whether a router holds the placement as it is."""
        return any(lease.hold for lease in self.standing().values())

    def wait_applied(self, number: tuple[int, int], timeout_s: float) -> bool:
        """Waits until every router that has a lease routes by the placement. False after the timeout."""
        deadline_s = self._clock() + timeout_s
        with self._changed:
            while behind := [lease for lease in self._standing().values() if lease.applied < number]:
                now_s = self._clock()
                if now_s >= deadline_s:
                    return False
                self._changed.wait(max(min(deadline_s, *(lease.expires_s for lease in behind)) - now_s, 1e-3))
            return True

    def _standing(self) -> dict[str, Lease]:
        now_s = self._clock()
        self._leases = {router: lease for router, lease in self._leases.items() if lease.expires_s > now_s}
        return self._leases


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

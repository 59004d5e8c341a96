"""Which of a cluster's routers to ask: those that a client knows, and the way of one text from router to router."""

import threading
import time
from collections.abc import Iterable

from moecluster.errors import MoeClusterError
from moecluster.rpc.router.failover import Patience, RequestFailover, is_loss

AVOID_S = 10.0  # a router that was lost is asked after the others for so long
PAUSE_S = 0.2  # between two rounds in which no router took the text


class Routers:
    """The routers of one cluster, as far as a client knows them. Texts begin with each in turn. Thread-safe."""

    def __init__(self, addresses: Iterable[str]) -> None:
        """addresses: host:port of each."""
        self._lock = threading.Lock()
        self._addresses = tuple(dict.fromkeys(addresses))
        self._turn = 0
        self._lost_s: dict[str, float] = {}  # when, by time.monotonic

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    def in_turn(self) -> list[str]:
        """All of them, the next one's turn first; those that were lost a short time ago come last."""
        with self._lock:
            if not self._addresses:
                return []
            turn = self._turn % len(self._addresses)
            self._turn += 1
            ordered = self._addresses[turn:] + self._addresses[:turn]
            since_s = time.monotonic() - AVOID_S
            return sorted(ordered, key=lambda address: self._lost_s.get(address, since_s) > since_s)

    def lost(self, address: str) -> None:
        """It did not answer, or broke off."""
        with self._lock:
            self._lost_s[address] = time.monotonic()

    def replace(self, addresses: Iterable[str]) -> None:
        """Where they are now."""
        with self._lock:
            self._addresses = tuple(dict.fromkeys(addresses))
            self._lost_s = {a: lost_s for a, lost_s in self._lost_s.items() if a in self._addresses}


class Route:
    """The way of one text: the next router to ask whenever one is lost or full, and when to give up. Does no I/O.

    In a round every known router is asked once, then those that are found by asking where they are now. A round in
    which none took the text is followed by another until patience_s is over. Once a router has written anything, a loss
    begins a new round with new patience. The weights that the text was begun with are given up only when some router is
    there without them, and none that may hold them is full or away; or when patience is over.
    """

    def __init__(self, routers: Routers, *, patience_s: float, timeout_s: float, discovers: bool) -> None:
        """timeout_s: of the whole text, from now. discovers: somebody can be asked where the routers are now."""
        self._routers = routers
        self._failover = RequestFailover(Patience(request_timeout_s=timeout_s, router_wait_timeout_s=patience_s))
        self._discovers = discovers
        self._begin_round()
        self._asked = ""  # the router that was asked last
        self.any_version = False  # the text is to go on with whatever weights are served

    @property
    def left_s(self) -> float:
        """Until the text's deadline."""
        return self._failover.left_s

    def next(self) -> str | None:
        """The address to ask; None when this round is through those that are known."""
        self._asked = self._left.pop(0) if self._left else ""
        return self._asked or None

    def failed(self, error: MoeClusterError, *, wrote: bool) -> None:
        """The router that was asked last is lost, full or without the text's weights, or its batch broke. Raises any
        error that another router would not mend, and BatchBroken once it was one batch too many.

        wrote: it had added to the text.
        """
        self._failover.failed(error)
        if is_loss(error):
            self._routers.lost(self._asked)
        if wrote:
            self.any_version = False
            self._failover.progressed()
            self._begin_round()

    def wants_discovery(self) -> bool:
        """Whether to ask now where the routers are; then `discovered` is to be called."""
        return self._to_discover

    def discovered(self, addresses: Iterable[str]) -> None:
        """Where the routers are now: they are asked next."""
        self._to_discover = False
        self._routers.replace(addresses)
        self._left = self._routers.in_turn()

    def pause_s(self) -> float:
        """How long to wait before the next round, which begins with this call.

        Raises the last error when patience is over, or would be: Exhausted if a router was there, StaleRequest if it
        has not the weights that are served either, else Unavailable.
        """
        failover = self._failover
        wait_s = PAUSE_S if failover.full is None else max(failover.full.retry_after_s or 0.0, PAUSE_S)
        over = failover.is_over(wait_s) or wait_s >= failover.left_s
        if not self.any_version and failover.gives_up_version(is_over=over):
            self.any_version, wait_s = True, 0.0
        elif over:
            raise failover.full or failover.stale or failover.lost
        self._begin_round()
        return wait_s

    def _begin_round(self) -> None:
        self._failover.begin_round()
        self._left = self._routers.in_turn()
        self._to_discover = self._discovers

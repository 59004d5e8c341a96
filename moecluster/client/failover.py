"""The routers that a client knows, and the failover of one request between them."""

import threading
import time
from collections.abc import Iterable

from moecluster.errors import MoeClusterError
from moecluster.rpc.router.failover import Patience, RequestFailover, is_loss

AVOID_S = 10.0  # how long a lost router is asked after the others
PAUSE_S = 0.2  # between two rounds in which no router took the request


class Routers:
    """The routers of one cluster that a client knows. Requests start round-robin. Thread-safe."""

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
        """All routers, starting with the next in turn; recently lost ones come last."""
        with self._lock:
            if not self._addresses:
                return []
            turn = self._turn % len(self._addresses)
            self._turn += 1
            ordered = self._addresses[turn:] + self._addresses[:turn]
            since_s = time.monotonic() - AVOID_S
            return sorted(ordered, key=lambda address: self._lost_s.get(address, since_s) > since_s)

    def lost(self, address: str) -> None:
        """Records that a router did not answer, or broke off."""
        with self._lock:
            self._lost_s[address] = time.monotonic()

    def replace(self, addresses: Iterable[str]) -> None:
        """Replaces the addresses, keeping the loss times of those that remain."""
        with self._lock:
            self._addresses = tuple(dict.fromkeys(addresses))
            self._lost_s = {a: lost_s for a, lost_s in self._lost_s.items() if a in self._addresses}


class Route:
    """The failover of one request: the next router to ask when one is lost or full, and when to give up. Does no I/O.

    In a round every known router is asked once, then the routers found by discovery. If none took the request, another
    round follows until patience_s is over. If a router generated tokens before it was lost, a new round begins with new
    patience. The request gives up the weight version that it started with only if some router does not have it, and
    either patience is over or no router that may have it is full or lost.
    """

    def __init__(self, routers: Routers, *, patience_s: float, timeout_s: float, discovers: bool) -> None:
        """timeout_s: of the whole request, from now. discovers: the caller can look up the routers' current
        addresses."""
        self._routers = routers
        self._failover = RequestFailover(Patience(request_timeout_s=timeout_s, router_wait_timeout_s=patience_s))
        self._discovers = discovers
        self._begin_round()
        self._asked = ""  # the router that was asked last
        self.any_version = False  # the request may continue with any served weights

    @property
    def left_s(self) -> float:
        """Seconds until the request's deadline."""
        return self._failover.left_s

    def next(self) -> str | None:
        """The next address to ask; None when this round has asked all known routers."""
        self._asked = self._left.pop(0) if self._left else ""
        return self._asked or None

    def failed(self, error: MoeClusterError, *, generated: bool) -> None:
        """Records that the router asked last is lost, full or without the request's weights, or that its batch broke.
        Raises errors that another router would not fix, and BatchBroken once too many batches broke.

        generated: the router had generated tokens.
        """
        self._failover.failed(error)
        if is_loss(error):
            self._routers.lost(self._asked)
        if generated:
            self.any_version = False
            self._failover.progressed()
            self._begin_round()

    def wants_discovery(self) -> bool:
        """Whether the caller should discover the routers now and then call `discovered`."""
        return self._to_discover

    def discovered(self, addresses: Iterable[str]) -> None:
        """Sets the routers' current addresses, which are asked next."""
        self._to_discover = False
        self._routers.replace(addresses)
        self._left = self._routers.in_turn()

    def pause_s(self) -> float:
        """Begins the next round; returns how long to wait before it.

        Raises when patience is over, or would be after the wait: Exhausted if a router was full, else StaleRequest if a
        router lacked the weights, else the error of the last lost router.
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

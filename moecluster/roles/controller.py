"""The controller: which experts stand where, published to the routers; lost actors are filled again.

It keeps no state that it cannot read back from the actors. A new one takes a higher term, tells it to the actors (which
then refuse older orders), and keeps what they hold. For now the placement is fixed.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moecluster.errors import MoeClusterError, ResourceError, StaleOrder, UserError
from moecluster.metrics import Metrics
from moecluster.placement.balancedness import layer_balancedness
from moecluster.roles.actor_keeper import ActorKeeper, ActorSupervisor, Connect, Orders, Watch
from moecluster.rpc.placement_board import NEVER, PlacementBoard
from moecluster.types import ActorAddress, ControllerStatus, ExpertId, LoadSnapshot, Placement, Replica

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0  # for an actor's answer to a new controller


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """What a controller starts with."""

    actors: tuple[str, ...]
    replicas: tuple[Replica, ...]
    layer_experts: Mapping[int, int]  # MoE layer -> its number of experts
    checkpoint: str  # a directory that the expert actors see
    dtype: str = ""  # empty: the checkpoint's
    lease_s: float = 10.0
    health_period_s: float = 1.0
    start_timeout_s: float = 60.0  # for Ray to start an actor anew
    load_timeout_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A router that is there."""

    expires_s: float
    applied: tuple[int, int]


class Controller:
    """Looks after the expert actors, and is the source of placements. Thread-safe."""

    def __init__(
        self,
        settings: ControllerSettings,
        *,
        supervisor: ActorSupervisor,
        connect: Connect,
        watch: Watch,
        metrics: Metrics,
        on_deposed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_deposed is called when another controller has taken over. clock: seconds, for leases and durations."""
        self.lease_s = settings.lease_s
        self._settings = settings
        self._metrics = metrics
        self._on_deposed = on_deposed
        self._clock = clock
        self._board = PlacementBoard()
        self._lock = threading.RLock()
        self._term = 0
        self._generation = 0
        self._checkpoint = settings.checkpoint
        self._up: dict[str, ActorAddress] = {}
        self._down_since_s: dict[str, float] = {}
        self._first_outcomes: dict[str, MoeClusterError | None] = {}  # of every actor, once it has one
        self._all_tried = threading.Event()
        self._leases: dict[str, Lease] = {}
        self._keepers = {
            actor: ActorKeeper(
                actor,
                tuple(sorted(r.expert for r in settings.replicas if r.actor == actor)),
                owner=self,
                supervisor=supervisor,
                connect=connect,
                watch=watch,
                health_period_s=settings.health_period_s,
                start_timeout_s=settings.start_timeout_s,
                load_timeout_s=settings.load_timeout_s,
            )
            for actor in settings.actors
        }

    def start(self, timeout_s: float) -> None:
        """Reads what the actors hold, loads what is missing, and publishes the first placement.

        An actor that does not come up is tried on and on, without being waited for. Raises UserError if an actor
        refuses its experts for something that the user can mend, ResourceError if none came up within the timeout.
        """
        self._take_over()
        for keeper in self._keepers.values():
            keeper.start()
        self._all_tried.wait(timeout_s)
        with self._lock:
            refusals = [e for e in self._first_outcomes.values() if isinstance(e, UserError)]
            if refusals:
                raise refusals[0]
            if not self._up:
                failures = [f"; {error}" for error in self._first_outcomes.values() if error is not None]
                raise ResourceError(f"no expert actor was ready within {timeout_s:g} s{''.join(failures[:1])}")
            self._all_tried.set()
            if self._board.number == NEVER:
                self._publish()

    def close(self) -> None:
        """Leaves the actors as they are: a successor finds them."""
        for keeper in self._keepers.values():
            keeper.close()
        self._board.close()

    # -- what routers see --

    def current(self, timeout_s: float) -> Placement:
        """The standing placement; waits for a first one. Raises Unavailable after the timeout."""
        return self._board.current(timeout_s)

    def newer_than(self, number: tuple[int, int], timeout_s: float) -> Placement | None:
        """Waits for a placement with a higher (term, generation); None after the timeout."""
        return self._board.newer_than(number, timeout_s)

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        """A router got no answer. The actor's own answer, or silence, to the controller decides."""
        logger.info("%s (%s) is reported: %s", actor, incarnation, reason)
        keeper = self._keepers.get(actor)
        if keeper is not None:
            keeper.look()

    def renew_lease(self, router: str, applied: tuple[int, int]) -> None:
        """The router counts for lease_s from now on."""
        with self._lock:
            self._leases[router] = Lease(expires_s=self._clock() + self.lease_s, applied=applied)

    def leases(self) -> dict[str, Lease]:
        """Routers that hold a lease now."""
        with self._lock:
            now_s = self._clock()
            self._leases = {router: lease for router, lease in self._leases.items() if lease.expires_s > now_s}
            return dict(self._leases)

    def report_load(self, router: str, load: LoadSnapshot) -> None:
        """Shows how evenly a router's last window was spread."""
        for layer, balancedness in layer_balancedness(self._board.current(0.0), load.tokens).items():
            self._metrics.set_layer_balancedness(layer, balancedness)

    # -- what users and training order --

    def set_checkpoint(self, checkpoint: str) -> None:
        """Lost experts are loaded from this directory from now on."""
        with self._lock:
            self._checkpoint = checkpoint
            self._publish()

    def status(self) -> ControllerStatus:
        """The cluster as it was last seen."""
        with self._lock:
            return ControllerStatus(
                term=self._term,
                generation=self._generation,
                actors=tuple(keeper.state() for keeper in self._keepers.values()),
                checkpoint=self._checkpoint,
                routers=len(self.leases()),
            )

    # -- what keepers say --

    def orders(self) -> Orders:
        """What stands now."""
        with self._lock:
            return Orders(
                term=self._term,
                generation=self._generation,
                checkpoint=self._checkpoint,
                dtype=self._settings.dtype,
            )

    def actor_up(self, address: ActorAddress, *, loaded_bytes: int) -> None:
        """The actor holds all its experts: routers may use it."""
        with self._lock:
            self._up[address.actor] = address
            self._note_outcome(address.actor, None)
            since_s = self._down_since_s.pop(address.actor, None)
            if since_s is not None:
                self._metrics.count_operation("restore", "idle")
                self._metrics.observe_operation("restore", seconds=self._clock() - since_s, moved_bytes=loaded_bytes)
            self._publish()

    def actor_down(self, actor: str) -> None:
        """The actor is lost: its experts' requests go to other replicas, or wait."""
        with self._lock:
            self._up.pop(actor, None)
            self._down_since_s[actor] = self._clock()
            self._metrics.count_operation("restore", "preparing")
            self._publish()

    def actor_failed(self, actor: str, error: MoeClusterError) -> None:
        """The actor cannot be brought up now; its keeper goes on trying."""
        with self._lock:
            self._note_outcome(actor, error)
            if actor in self._down_since_s:
                self._metrics.count_operation("restore", "failed")

    def deposed(self, error: StaleOrder) -> None:
        """Another controller has taken over: gives no more orders."""
        logger.warning("another controller has taken over: %s", error)
        self._on_deposed()

    # -- inside --

    def _take_over(self) -> None:
        """Takes a higher term than every actor has seen, and the checkpoint that the newest placement names."""
        with ThreadPoolExecutor(max_workers=len(self._keepers)) as pool:
            answers = pool.map(lambda keeper: keeper.read(READ_TIMEOUT_S), self._keepers.values())
        seen = sorted((s for s in answers if s is not None), key=lambda status: status.placement)
        with self._lock:
            if seen:
                self._term, self._generation = seen[-1].placement
                self._checkpoint = seen[-1].checkpoint or self._checkpoint
            self._term += 1

    def _note_outcome(self, actor: str, error: MoeClusterError | None) -> None:
        self._first_outcomes.setdefault(actor, error)
        if len(self._first_outcomes) == len(self._keepers):
            self._all_tried.set()

    def _publish(self) -> None:
        """A new generation: the replicas on actors that are up. Not before every actor was tried, or routers would see
        a part of the placement and wait for the rest."""
        if not self._all_tried.is_set():
            return
        self._generation += 1
        placement = Placement(
            term=self._term,
            generation=self._generation,
            layer_experts=dict(self._settings.layer_experts),
            actors=dict(sorted(self._up.items())),
            replicas=_scaled(tuple(r for r in self._settings.replicas if r.actor in self._up)),
        )
        self._board.publish(placement)
        self._metrics.set_generation(self._generation)
        self._metrics.set_replicas(self._replica_counts(placement))
        for keeper in self._keepers.values():
            keeper.look()

    def _replica_counts(self, placement: Placement) -> dict[ExpertId, int]:
        counts = {
            ExpertId(layer=layer, index=index): 0
            for layer, count in self._settings.layer_experts.items()
            for index in range(count)
        }
        for replica in placement.replicas:
            counts[replica.expert] += 1
        return counts


def _scaled(replicas: tuple[Replica, ...]) -> tuple[Replica, ...]:
    """The replicas that are left, each expert's shares scaled to sum to 1."""
    total: dict[ExpertId, float] = {}
    for replica in replicas:
        total[replica.expert] = total.get(replica.expert, 0.0) + replica.share
    return tuple(Replica(expert=r.expert, actor=r.actor, share=r.share / total[r.expert]) for r in replicas)

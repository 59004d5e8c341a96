"""A router's connections to the expert actors of the current placement."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence

from moecluster.dispatch.replica_choice import LayerTable, layer_table
from moecluster.errors import MoeClusterError, UserError
from moecluster.metrics.dispatch import LaneUse
from moecluster.rpc.controller.interface import ControllerLink
from moecluster.rpc.expert.interface import ControlConnection, ExpertControl, ExpertTransport
from moecluster.types import ActorAddress, ExpertId, Placement, PlacementNumber

LEFT_S = 120.0  # how long a transport to an actor outside the placement stays open; a broken one closes itself
LANE_RETRY_S = 30.0  # how long rows travel inline for want of memory to share, before it is tried again
SUSPECT_S = 1.0  # how long an actor that did not answer is avoided

logger = logging.getLogger(__name__)


class ExpertPool:
    """Opens transports on first use, and reopens them when an actor has moved or restarted. Thread-safe."""

    def __init__(
        self,
        placements: ControllerLink,
        *,
        connect: Callable[[ActorAddress], ExpertTransport],
        control: Callable[[ActorAddress], ControlConnection],
        lane_retry_s: float = LANE_RETRY_S,
    ) -> None:
        """connect and control raise a MoeClusterError if the actor does not answer."""
        self._placements = placements
        self._connect = connect
        self._control = control
        self._lane_retry_s = lane_retry_s
        self._retry_s: dict[str, float] = {}  # actors whose rows travel inline for now: when to try again
        self._replaced: list[tuple[float, ExpertTransport]] = []  # since when; requests may still use them
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        self._open: dict[str, tuple[ActorAddress, ExpertTransport]] = {}
        self._controls: dict[str, tuple[ActorAddress, ControlConnection]] = {}
        self._tables: dict[int, LayerTable] = {}
        self._tables_of: PlacementNumber | None = None
        self._aside: frozenset[tuple[str, ExpertId]] = frozenset()  # replicas that returned NaN or infinity,
        self._aside_of: PlacementNumber | None = None  # excluded for this placement only
        self._suspects: dict[ActorAddress, tuple[float, MoeClusterError]] = {}  # until when, and why
        self._left_s: dict[str, float] = {}  # actors outside the placement with an open transport: since when

    def placement(self, timeout_s: float = 60.0) -> Placement:
        """The newest placement."""
        return self._placements.current(timeout_s)

    def wait_for_change(self, number: PlacementNumber, timeout_s: float) -> bool:
        """Waits for a newer placement; returns False if none came."""
        return self._placements.newer_than(number, timeout_s) is not None

    def table(self, placement: Placement, layer: int, avoid: Collection[str] = ()) -> LayerTable:
        """The layer's part of a placement. Raises UserError if the model has no experts in the layer."""
        if layer not in placement.layer_experts:
            raise UserError(
                f"the cluster serves no experts of layer {layer}, only of {sorted(placement.layer_experts)}: "
                "the trunk is of another model"
            )
        if not avoid and self._tables_of != placement.number:
            self._close_left(placement)
        with self._lock:
            aside = self._aside if self._aside_of == placement.number else frozenset()
            if avoid:
                return layer_table(placement, layer, avoid, aside)
            if self._tables_of != placement.number:
                self._tables, self._tables_of = {}, placement.number
            table = self._tables.get(layer)
            if table is None:
                table = self._tables[layer] = layer_table(placement, layer, (), aside)
            return table

    def set_aside(self, placement: Placement, actor: str, expert: ExpertId) -> bool:
        """Excludes a replica that returns NaN or infinity from this placement, unless it is the expert's only one, and
        reports it to the controller. Returns False if it was already excluded."""
        with self._lock:
            if self._aside_of != placement.number:
                self._aside, self._aside_of = frozenset(), placement.number
            if (actor, expert) in self._aside:
                return False
            self._aside |= {(actor, expert)}
            self._tables.pop(expert.layer, None)
        self._placements.report_nonfinite(actor, placement.actors[actor].incarnation, expert, placement.number)
        return True

    def transport(self, address: ActorAddress) -> ExpertTransport:
        """Returns the transport to an actor, connecting if necessary. Raises what connecting raises."""
        found = self._open.get(address.actor)
        if found is not None and found[0] == address:
            return found[1] if not found[1].shortage else self._better(address, found[1])
        with self._lock:
            opening = self._opening.setdefault(address.actor, threading.Lock())
        with opening:
            found = self._open.get(address.actor)
            if found is not None and found[0] == address:
                return found[1]
            if found is not None:
                self._open.pop(address.actor, None)  # drop() may have removed it already
                found[1].close()
            try:
                transport = self._connect(address)
            except MoeClusterError as exc:
                self._suspect(address, exc)
                raise
            self._open[address.actor] = (address, transport)
            if transport.shortage:
                logger.warning("rows for %s travel inline: %s", address.actor, transport.shortage)
                self._retry_s[address.actor] = time.monotonic() + self._lane_retry_s
            return transport

    def shortages(self) -> dict[str, str]:
        """Returns the actors whose rows travel inline for want of memory to share, and why."""
        with self._lock:
            return {actor: found.shortage for actor, (_, found) in sorted(self._open.items()) if found.shortage}

    def _better(self, address: ActorAddress, before: ExpertTransport) -> ExpertTransport:
        """Tries for shared memory again, once in a while; returns the transport to use. The one before stays open for
        the requests that use it."""
        now_s = time.monotonic()
        with self._lock:
            if now_s < self._retry_s.get(address.actor, 0.0) or self._open.get(address.actor) != (address, before):
                return before
            self._retry_s[address.actor] = now_s + self._lane_retry_s  # other threads go on meanwhile
        try:
            tried = self._connect(address)
        except MoeClusterError:
            return before
        with self._lock:
            is_better = not tried.shortage and self._open.get(address.actor) == (address, before)
            if is_better:
                self._open[address.actor] = (address, tried)
                self._replaced.append((now_s, before))
        if not is_better:
            tried.close()
            return before
        logger.info("rows for %s travel through shared memory again", address.actor)
        return tried

    def _close_left(self, placement: Placement) -> None:
        """Closes transports to actors that left the placement, once no request of an older placement can still use
        them."""
        now_s = time.monotonic()
        with self._lock:
            without_place = [actor for actor in list(self._open) if actor not in placement.actors]
            self._left_s = {actor: self._left_s.get(actor, now_s) for actor in without_place}
            over = [actor for actor, since_s in self._left_s.items() if now_s - since_s >= LEFT_S]
            transports = [self._open.pop(actor)[1] for actor in over]
            transports += [replaced for since_s, replaced in self._replaced if now_s - since_s >= LEFT_S]
            self._replaced = [entry for entry in self._replaced if now_s - entry[0] < LEFT_S]
        for transport in transports:
            transport.close()

    def lanes(self) -> list[LaneUse]:
        """Returns the lane of every open connection."""
        found = sorted(self._open.copy().items())
        return [LaneUse(actor=actor, lane=t.name, reason=t.reason) for actor, (_, t) in found]

    def drop(self, address: ActorAddress, transport: ExpertTransport | None, reason: MoeClusterError) -> None:
        """Closes the transport to an actor that did not answer, and reports the actor to the controller."""
        with self._lock:
            found = self._open.get(address.actor)
            if found is not None and found[1] is transport:
                del self._open[address.actor]
        if transport is not None:
            transport.close()
        self._suspect(address, reason)
        self.report(address, reason)

    def suspects(self, placement: Placement) -> dict[str, MoeClusterError]:
        """Incarnations in the placement that recently failed to answer, by actor, and why. Other replicas are
        preferred, so that at most one request hits a dead actor before the controller notices."""
        if not self._suspects:
            return {}
        now_s = time.monotonic()
        with self._lock:
            self._suspects = {address: kept for address, kept in self._suspects.items() if kept[0] > now_s}
            return {a.actor: why for a, (_, why) in self._suspects.items() if placement.actors.get(a.actor) == a}

    def _suspect(self, address: ActorAddress, reason: MoeClusterError) -> None:
        with self._lock:
            self._suspects[address] = (time.monotonic() + SUSPECT_S, reason)

    def report(self, address: ActorAddress, reason: MoeClusterError) -> None:
        """Reports to the controller that an actor fails to serve its experts."""
        self._placements.report_failure(address.actor, address.incarnation, str(reason))

    def want(self, layer: int, experts: Sequence[int]) -> None:
        """Reports to the controller that tokens wait for experts without any replica."""
        self._placements.want_experts(layer, experts)

    def controls(self) -> dict[str, ExpertControl]:
        """The control connection to every actor of the current placement, by name.

        A connection stays open until a later call finds that its actor has moved, restarted or left.
        """
        actors = self.placement().actors
        with self._lock:
            for name, (address, control) in list(self._controls.items()):
                if actors.get(name) != address:
                    del self._controls[name]
                    control.close()
            for name, address in actors.items():
                if name not in self._controls:
                    self._controls[name] = (address, self._control(address))
            return {name: control for name, (_, control) in self._controls.items()}

    def close(self) -> None:
        """Closes all connections."""
        with self._lock:
            transports, self._open = self._open, {}
            replaced, self._replaced = self._replaced, []
            controls, self._controls = self._controls, {}
        for _, transport in (*transports.values(), *replaced):
            transport.close()
        for _, control in controls.values():
            control.close()

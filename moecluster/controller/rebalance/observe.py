"""The policy's input: the load window, measured speeds and the current placement, as arrays with names."""

import logging
from dataclasses import dataclass, replace

import numpy as np

from moecluster.controller.context import ControllerContext
from moecluster.controller.load.direct import LoadSource, SourceReading
from moecluster.errors import MoeClusterError
from moecluster.placement.layout import Fleet, Floats
from moecluster.placement.load.speed import SpeedMeter
from moecluster.placement.load.window import make_load_window
from moecluster.placement.names import Names, to_layout
from moecluster.placement.policy.interface import USUAL_BURST, Observation
from moecluster.types import ActorLoads, ExpertId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ObserverSettings:
    """The load window, the slots per actor, and the budget of a change."""

    window: str = "exponential"
    window_s: float = 30.0
    slots_per_layer: int  # replicas of each layer that an actor has room for
    budget_bytes: float = 2.0**30
    burst: float = USUAL_BURST


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An observation, and the names of its array positions."""

    observation: Observation
    names: Names


class Observer:
    """Used by one thread at a time."""

    def __init__(self, context: ControllerContext, source: LoadSource, settings: ObserverSettings) -> None:
        self.settings = settings
        self._reports = context.reports
        self._cluster_state = context.state
        self._source = source
        self._window = make_load_window(settings.window, context.state.layer_experts, settings.window_s)
        self._meter = SpeedMeter()
        self._last: SourceReading | None = None
        self._failure = ""  # why the last reading failed

    def read(self, now_s: float) -> None:
        """Reads the source. If that fails, logs why and keeps the last load."""
        try:
            reading = self._source.read(now_s)
            if reading is self._last:
                return  # nothing new was scraped
            self._window.add(reading.counters)
            self._meter.add(reading.work)
            self._last = reading
            self._failure = ""
        except MoeClusterError as exc:
            if str(exc) != self._failure:
                logger.warning("the load cannot be read: %s", exc)
            self._failure = str(exc)

    @property
    def load_LE(self) -> Floats:
        """Assignments per second."""
        return self._window.load_LE

    @property
    def read_s(self) -> float | None:
        """Time of the counters that were last read; None: none were yet."""
        return None if self._last is None else self._last.counters.now_s

    @property
    def covered_s(self) -> float:
        """How long the window has observed the load."""
        return self._window.covered_s

    @property
    def last_token_s(self) -> float:
        """Time of the last reading that showed a token."""
        return self._window.last_token_s

    def idle_experts(self, idle_s: float) -> frozenset[ExpertId]:
        """Returns the experts that no token was routed to for idle_s; none if the window covers less."""
        if self.covered_s < idle_s:
            return frozenset()
        layers = sorted(self._cluster_state.layer_experts)
        found = np.argwhere(self._window.idle_s_LE >= idle_s).tolist()
        return frozenset(
            ExpertId(layer=layers[at], index=index)
            for at, index in found
            if index < self._cluster_state.layer_experts[layers[at]]
        )

    def observe(self, now_s: float) -> Seen:
        """Returns the cluster now, with the actors that are up. Until a token is counted, all experts have equal
        load."""
        up = self._cluster_state.up()
        names = Names(layer_experts=self._cluster_state.layer_experts, actors=tuple(up))
        load_LE = self.load_LE
        counted = bool(load_LE.any())
        if not counted:
            load_LE = (np.arange(load_LE.shape[1]) < names.num_experts_L[:, None]).astype(np.float64)
        nodes = sorted({u.address.node for u in up.values()})
        leaving = self._cluster_state.leaving
        fleet = Fleet(
            slots_A=np.array([0 if a in leaving else self.settings.slots_per_layer for a in up], dtype=np.int64),
            speed_A=self._meter.speed_A(names.actors),
            node_A=np.array([nodes.index(u.address.node) for u in up.values()], dtype=np.int64),
            expert_bytes_L=np.full(len(names.layers), self._reports.expert_bytes()),
        )
        cold_LE = np.zeros(load_LE.shape, dtype=np.bool_)
        for expert in self._cluster_state.cold:
            cold_LE[names.layers.index(expert.layer), expert.index] = True
        # A replica that is still being loaded keeps its slot, unless its expert is lost and so needed at once.
        lost = self._cluster_state.lost()
        placed = [
            r
            for r in self._cluster_state.replicas()
            if r.actor in up and (r.expert in up[r.actor].held or r.expert not in lost)
        ]
        observation = Observation(
            now_s=now_s,
            load_LE=np.where(cold_LE, 0.0, load_LE),
            fleet=fleet,
            layout=to_layout(placed, names),
            budget_bytes=self.settings.budget_bytes,
            burst=self.settings.burst,
            cold_LE=cold_LE,
            load_counted=counted,
        )
        return Seen(observation=observation, names=names)

    def actor_loads(self) -> tuple[ActorLoads, ...]:
        """Returns every actor that is up, as the planner sees it."""
        up = self._cluster_state.up()
        speeds = dict(zip(up, self._meter.speed_A(tuple(up)).tolist(), strict=True))
        work = self._reports.work()
        return tuple(
            ActorLoads(
                actor=actor,
                node=u.address.node,
                computed_rows=work[actor].computed_rows if actor in work else 0,
                busy_s=work[actor].busy_s if actor in work else 0.0,
                speed=speeds[actor],
                slots=0 if actor in self._cluster_state.leaving else self.settings.slots_per_layer,
            )
            for actor, u in up.items()
        )


def with_budget(seen: Seen, budget_bytes: float) -> Seen:
    """Returns the observation with another budget."""
    return replace(seen, observation=replace(seen.observation, budget_bytes=budget_bytes))

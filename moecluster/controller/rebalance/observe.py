"""What the policy is shown: the load window, measured speeds, and the current placement, as numbers with names."""

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
    """How the load is looked at, and what room there is."""

    window: str = "exponential"
    window_s: float = 30.0
    slots_per_layer: int  # replicas of each layer that an actor has room for
    budget_bytes: float = 2.0**30
    burst: float = USUAL_BURST


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An observation, and the names of its positions."""

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
        """Takes a reading. One that fails is noted, and the load stays as it was seen last."""
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
    def covered_s(self) -> float:
        """Time that the window has seen."""
        return self._window.covered_s

    @property
    def last_token_s(self) -> float:
        """When the reading was taken that last showed a token."""
        return self._window.last_token_s

    def idle_experts(self, idle_s: float) -> frozenset[ExpertId]:
        """Experts that no token wanted for so long."""
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
        """The cluster now, of the actors that are up. Until a token was counted, every expert has the same load."""
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
        # A replica that its actor is still loading keeps its place, unless its expert is needed at once.
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
        """Every actor that is up, as the planner sees it."""
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
    """The same observation with another budget."""
    return replace(seen, observation=replace(seen.observation, budget_bytes=budget_bytes))

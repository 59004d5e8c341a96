"""Builds the windows of a trace from readings of a running cluster's counters."""

import math

import numpy as np

from moecluster.errors import ResourceError
from moecluster.placement.load.window import CounterGains, CounterReading
from moecluster.simulation.trace.format import TraceActor, TraceEvent, TraceHeader, TraceLayer, TraceWindow
from moecluster.types import ActorPhase, ActorState, ClusterLoads

LENGTH_TOLERANCE = 0.5  # of a window: a reading that is earlier or later by more ends no window
SPEED_DIGITS = 1  # measured speeds fluctuate, and a resumed recording must have the same header


class TraceRecorder:
    """Takes readings about window_s apart, and makes windows of the differences."""

    def __init__(self, loads: ClusterLoads, actors: tuple[ActorState, ...], window_s: float) -> None:
        """Takes the first reading, which starts the first window. Raises ResourceError if there is no expert actor."""
        self.header = trace_header(loads, window_s)
        self._layer_experts = dict(loads.layer_experts)
        self._gains = CounterGains(loads.layer_experts, forget_s=math.inf)
        self._gains.take(_counters(loads))
        self._time_s = loads.time_s
        # All actors of the header count as alive: one that is not serving dies in the first window.
        self._lives = {actor.name: "" for actor in self.header.actors} | _serving(actors)

    def take(self, loads: ClusterLoads, actors: tuple[ActorState, ...]) -> TraceWindow | None:
        """Returns the window that ends with this reading; None if its length would be far from window_s.

        After None the next window starts at this reading. Raises ResourceError if the cluster's layers have changed.
        """
        if dict(loads.layer_experts) != self._layer_experts:
            raise ResourceError("the cluster serves a model of another shape by now; record it to another file")
        length_s = loads.time_s - self._time_s
        gains = self._gains.take(_counters(loads))
        events = self._events(actors)
        self._time_s = loads.time_s
        if abs(length_s - self.header.window_s) > LENGTH_TOLERANCE * self.header.window_s:
            return None
        counts_LE = np.zeros(self._gains.shape, dtype=np.int64)
        for gain in gains:
            counts_LE += gain.tokens_LE
        return TraceWindow(time_s=loads.time_s, counts_LE=counts_LE, events=events)

    def _events(self, actors: tuple[ActorState, ...]) -> tuple[TraceEvent, ...]:
        """Returns the header's actors that died or returned since the last reading; a new incarnation is both."""
        before, self._lives = self._lives, _serving(actors)
        events = []
        for actor in (entry.name for entry in self.header.actors):
            if actor in before and before[actor] != self._lives.get(actor):
                events.append(TraceEvent(kind="actor_died", actor=actor))
            if actor in self._lives and self._lives[actor] != before.get(actor):
                events.append(TraceEvent(kind="actor_returned", actor=actor))
        return tuple(events)


def trace_header(loads: ClusterLoads, window_s: float) -> TraceHeader:
    """Returns the header of a cluster's trace. Raises ResourceError if there is no expert actor."""
    if not loads.actors:
        raise ResourceError("the controller knows no expert actor yet; try again when moecluster status shows one")
    return TraceHeader(
        model=loads.model,
        window_s=window_s,
        layers=tuple(
            TraceLayer(layer=layer, experts=experts, expert_bytes=round(loads.expert_bytes[layer]))
            for layer, experts in sorted(loads.layer_experts.items())
        ),
        actors=tuple(
            TraceActor(
                name=actor.actor,
                slots=actor.slots,
                speed=max(round(actor.speed, SPEED_DIGITS), 10**-SPEED_DIGITS),
                node=actor.node,
            )
            for actor in sorted(loads.actors, key=lambda entry: entry.actor)
        ),
    )


def _counters(loads: ClusterLoads) -> CounterReading:
    return CounterReading(
        now_s=loads.time_s,
        tokens={
            router: {layer: np.array(counts, dtype=np.int64) for layer, counts in layers.items()}
            for router, layers in loads.tokens.items()
        },
    )


def _serving(actors: tuple[ActorState, ...]) -> dict[str, str]:
    """Returns actor -> incarnation of the serving actors."""
    return {actor.actor: actor.incarnation for actor in actors if actor.phase is ActorPhase.SERVING}

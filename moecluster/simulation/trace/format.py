"""A trace: the load of a cluster's experts, window by window, as a file of JSON lines.

The first line is the header; each further line is one complete window:

    {"format": "moecluster-trace", "version": 1, "model": "...", "window_s": 60.0,
     "layers": [{"layer": 3, "experts": 256, "expert_bytes": 22020096}, ...],
     "actors": [{"name": "expert-0", "slots": 8, "speed": 1.0, "node": "host-a"}, ...]}
    {"time_s": 60.0, "counts": [[812, 97, ...], ...], "events": [{"kind": "actor_died", "actor": "expert-0"}]}

time_s is the end of the window, on any increasing clock; counts are assignments within it, a list for each layer of the
header. Events happened within the window.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moecluster.placement.layout import Fleet, Ints

FORMAT = "moecluster-trace"
VERSION = 1
ACTOR_DIED, ACTOR_RETURNED = "actor_died", "actor_returned"
EVENT_KINDS = (ACTOR_DIED, ACTOR_RETURNED)
MOST_TOKENS = 2**53  # integers up to this are exact in any JSON reader


@dataclass(frozen=True, kw_only=True)
class TraceLayer:
    """A layer with experts."""

    layer: int
    experts: int
    expert_bytes: int  # weights of one expert


@dataclass(frozen=True, kw_only=True)
class TraceActor:
    """An actor that the trace was recorded on."""

    name: str
    slots: int  # replicas of each layer
    speed: float = 1.0  # relative to the others
    node: str = ""  # equal names share a node; empty: a node of its own


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """The model, layers and actors that a trace was recorded on."""

    model: str
    window_s: float
    layers: tuple[TraceLayer, ...]  # ascending
    actors: tuple[TraceActor, ...]

    @property
    def num_experts_L(self) -> Ints:
        return np.array([layer.experts for layer in self.layers], dtype=np.int64)

    def fleet(self) -> Fleet:
        """Returns the actors that the trace was recorded on, as a planner's fleet."""
        nodes = [actor.node or f"only {actor.name}" for actor in self.actors]
        number_of = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
        return Fleet(
            slots_A=np.array([actor.slots for actor in self.actors], dtype=np.int64),
            speed_A=np.array([actor.speed for actor in self.actors], dtype=np.float64),
            node_A=np.array([number_of[node] for node in nodes], dtype=np.int64),
            expert_bytes_L=np.array([layer.expert_bytes for layer in self.layers], dtype=np.float64),
        )


@dataclass(frozen=True, kw_only=True)
class TraceEvent:
    """A death or return of an actor."""

    kind: Literal["actor_died", "actor_returned"]
    actor: str


@dataclass(frozen=True, kw_only=True)
class TraceWindow:
    """The assignments and events of one window."""

    time_s: float  # its end
    counts_LE: Ints  # assignments, 0 beyond a layer's experts
    events: tuple[TraceEvent, ...] = ()

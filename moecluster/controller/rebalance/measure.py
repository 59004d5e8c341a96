"""Measures balancedness, for the metrics and for the gain of operations."""

import math
from collections import Counter
from collections.abc import Mapping

from moecluster.controller.context import ControllerContext
from moecluster.controller.rebalance.decide import Planner
from moecluster.placement.layout import Floats
from moecluster.placement.load.skew import load_entropy, overload_factor
from moecluster.placement.names import balancedness_L, mean_balancedness


class BalanceMeter:
    """Used by one thread at a time."""

    def __init__(self, context: ControllerContext, planner: Planner) -> None:
        self._cluster_state = context.state
        self._log = context.operations
        self._metrics = context.metrics
        self._clock = context.clock
        self._planner = planner
        self._unmeasured: dict[str, float] = {}  # operation -> when it ended

    def ended(self, operation_id: str) -> None:
        """The operation is done: its gain can be measured once a load window has passed."""
        self._unmeasured[operation_id] = self._clock()

    def measure_gains(self) -> None:
        """Fills in the measured balancedness of operations that ended a load window ago and saw tokens since."""
        self._unmeasured = {o: ended_s for o, ended_s in self._unmeasured.items() if self._log.keeps(o)}
        observer = self._planner.observer
        until_s = min(self._clock() - observer.settings.window_s, observer.last_token_s)
        ready = [operation for operation, ended_s in self._unmeasured.items() if ended_s <= until_s]
        if not ready:
            return
        for operation in ready:
            del self._unmeasured[operation]
        seen = self._planner.seen().observation
        if not seen.load_counted:
            return
        measured = mean_balancedness(seen.layout, seen.load_LE, seen.fleet)
        for operation in ready:
            self._log.update(operation, balancedness_measured=measured)

    def show(self) -> None:
        """Sets the metrics of the actors' speeds, and of each layer's balancedness and skew; removes those of layers
        without load."""
        layer_experts = sorted(self._cluster_state.layer_experts.items())
        loads = dict(zip(layer_experts, self._planner.observer.load_LE, strict=True))
        self._show_skew({layer: load_E[:experts] for (layer, experts), load_E in loads.items()})
        if not self._planner.observer.load_LE.any():
            for layer, _ in layer_experts:
                self._metrics.set_layer_balancedness(layer, None)
            return
        if not self._cluster_state.up():
            return
        seen = self._planner.seen()
        self._metrics.set_actor_speeds(
            dict(zip(seen.names.actors, seen.observation.fleet.speed_A.tolist(), strict=True))
        )
        layers = balancedness_L(seen.observation.layout, seen.observation.load_LE, seen.observation.fleet)
        for layer, balancedness in zip(seen.names.layers, layers.tolist(), strict=True):
            self._metrics.set_layer_balancedness(layer, None if math.isnan(balancedness) else balancedness)

    def _show_skew(self, loads: Mapping[int, Floats]) -> None:
        """loads: layer -> by expert."""
        observer = self._planner.observer
        idle = self._planner.idle_experts(observer.settings.window_s)
        dead = Counter(expert.layer for expert in idle)
        is_counted = observer.covered_s >= observer.settings.window_s
        self._metrics.set_expert_loads(loads)
        for layer, load_E in loads.items():
            has_tokens = is_counted and dead[layer] < len(load_E)  # else nobody sends any, and no expert is to blame
            self._metrics.set_layer_skew(
                layer,
                entropy=load_entropy(load_E),
                overload=overload_factor(load_E),
                dead=dead[layer] if has_tokens else None,
            )

"""Measures balancedness, for the metrics and for the gain of operations."""

import math

from moecluster.controller.context import ControllerContext
from moecluster.controller.rebalance.decide import Planner
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
        """Sets the metrics of the actors' speeds and of each layer's balancedness."""
        if not self._planner.observer.load_LE.any() or not self._cluster_state.up():
            return
        seen = self._planner.seen()
        self._metrics.set_actor_speeds(
            dict(zip(seen.names.actors, seen.observation.fleet.speed_A.tolist(), strict=True))
        )
        layers = balancedness_L(seen.observation.layout, seen.observation.load_LE, seen.observation.fleet)
        for layer, balancedness in zip(seen.names.layers, layers.tolist(), strict=True):
            self._metrics.set_layer_balancedness(layer, None if math.isnan(balancedness) else balancedness)

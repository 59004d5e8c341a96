"""Measures how even the actors' load is: for the metrics, and for what operations have gained."""

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
        """The operation is done: what it has gained can be measured once a window has passed over it."""
        self._unmeasured[operation_id] = self._clock()

    def measure_gains(self) -> None:
        """Fills in what operations have gained, of those that a window has passed over, and a token since."""
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
        """Tells the metrics the actors' speeds, and how even the load of each layer is."""
        if not self._planner.observer.load_LE.any() or not self._cluster_state.up():
            return
        seen = self._planner.seen()
        self._metrics.set_actor_speeds(
            dict(zip(seen.names.actors, seen.observation.fleet.speed_A.tolist(), strict=True))
        )
        layers = balancedness_L(seen.observation.layout, seen.observation.load_LE, seen.observation.fleet)
        for layer, balancedness in zip(seen.names.layers, layers.tolist(), strict=True):
            self._metrics.set_layer_balancedness(layer, None if math.isnan(balancedness) else balancedness)

"""Power laws of how a controller's cost grows with the cluster, and where it becomes the bottleneck."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moecluster.placement.layout import Fleet
from moecluster.placement.policy.interface import Policy
from moecluster.simulation.costs import Costs
from moecluster.simulation.scenario import Scenario
from moecluster.simulation.simulator import Simulator
from moecluster.simulation.synthetic_load import LoadShape, SyntheticLoads

_MOST_LOGARITHM = 700.0  # math.exp overflows a float beyond about 709


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """seconds = factor * size ** exponent."""

    factor: float
    exponent: float

    def size_at(self, seconds: float) -> float:
        """Returns the size that takes this long; infinite if the cost does not grow, or hardly."""
        if self.exponent <= 0:
            return math.inf
        logarithm = math.log(seconds / self.factor) / self.exponent
        return math.exp(logarithm) if logarithm < _MOST_LOGARITHM else math.inf


@dataclass(frozen=True, kw_only=True)
class MeasuredSize:
    """A controller's work at one number of actors: medians over its decisions."""

    actors: int
    replicas: int
    observe_s: float  # measured
    cold_decide_s: float  # measured: the first plan
    decide_s: float  # measured: a later decision
    apply_s: float  # simulated: until the copies of a later decision are in place


def fit_power_law(sizes: Sequence[float], seconds: Sequence[float]) -> PowerLaw:
    """Least squares on logarithms. All values positive, at least two different sizes."""
    assert len(set(sizes)) > 1, sizes
    exponent, log_factor = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return PowerLaw(factor=math.exp(float(log_factor)), exponent=float(exponent))


def sizes_around(num_actors: int, least: int, *, count: int = 4) -> list[int]:
    """Returns numbers of actors in even ratios, from num_actors / 8 (or what holds the experts) to twice as many."""
    smallest = min(max(num_actors // 8, least, 2), num_actors)
    return sorted({round(size) for size in np.geomspace(smallest, 2 * num_actors, count)})


def measure_sizes(
    sizes: Sequence[int],
    make_fleet: Callable[[int], Fleet],
    shape: LoadShape,
    make_policy: Callable[[], Policy[Any]],
    scenario: Scenario,
    costs: Costs,
    *,
    num_decisions: int = 8,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[MeasuredSize]:
    """Simulates each size for some decisions, with the same load per actor, and yields their costs."""
    every_window = dataclasses.replace(scenario, window_s=scenario.window_s * scenario.decide_every, decide_every=1)
    largest = max(sizes)
    for size in sizes:
        loads = SyntheticLoads(
            dataclasses.replace(shape, tokens_per_s=shape.tokens_per_s * size / largest),
            window_s=every_window.window_s,
            num_windows=num_decisions + 1,
            seed=scenario.seed,
        )
        simulator = Simulator(every_window, make_fleet(size), loads, make_policy(), costs, clock=clock)
        windows = list(simulator.run())
        first, *later = [decision for window in windows for decision in window.decisions]
        yield MeasuredSize(
            actors=size,
            replicas=windows[-1].replicas,
            observe_s=statistics.median(decision.observe_s for decision in later),
            cold_decide_s=first.decide_s,
            decide_s=statistics.median(decision.decide_s for decision in later),
            apply_s=statistics.median(decision.apply_s for decision in later),
        )

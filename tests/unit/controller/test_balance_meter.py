"""How the experts' loads show in the controller's metrics."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moecluster.controller.context import new_context
from moecluster.controller.load.direct import SourceReading
from moecluster.controller.rebalance.decide import Planner
from moecluster.controller.rebalance.measure import BalanceMeter
from moecluster.controller.rebalance.observe import Observer, ObserverSettings
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.metrics import Metrics
from moecluster.placement.load.window import CounterReading
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import ActorAddress, ExpertId, Replica, WeightVersion

LAYER_EXPERTS = {1: 4, 3: 2}
WINDOW_S = 10.0


@dataclass(kw_only=True)
class Counters:
    """A load source: what one router has counted."""

    tokens: dict[int, np.ndarray] = field(
        default_factory=lambda: {layer: np.zeros(n, dtype=np.int64) for layer, n in LAYER_EXPERTS.items()}
    )

    def read(self, now_s: float) -> SourceReading:
        tokens = {layer: tokens_E.copy() for layer, tokens_E in self.tokens.items()}
        return SourceReading(counters=CounterReading(now_s=now_s, tokens={"router": tokens}), work={})


class Meter:
    """A balance meter over two actors, on a clock of its own."""

    def __init__(self) -> None:
        self.now_s, self.source, self.metrics = 100.0, Counters(), Metrics(model="m")
        context = new_context(
            LAYER_EXPERTS, lease_s=1.0, board=PlacementBoard(), metrics=self.metrics, clock=lambda: self.now_s
        )
        experts = [ExpertId(layer=layer, index=e) for layer, n in LAYER_EXPERTS.items() for e in range(n)]
        replicas = [Replica(expert=each, actor=f"expert-{each.index % 2}") for each in experts]
        context.state.begin(
            term=1,
            generation=0,
            versions=WeightVersions.only(WeightVersion(version=1, checkpoint="/m")),
            actors=("expert-0", "expert-1"),
            replicas=replicas,
        )
        for i in range(2):
            address = ActorAddress(actor=f"expert-{i}", address=f"127.0.0.1:{i + 1}", incarnation="a")
            context.state.actor_up(address, [r.expert for r in replicas if r.actor == address.actor])
        settings = ObserverSettings(window="sliding", window_s=WINDOW_S, slots_per_layer=3)
        self.planner = Planner(context, "share", Observer(context, self.source, settings))
        self._meter = BalanceMeter(context, self.planner)

    def pass_second(self, *tokens: int) -> None:
        """Adds tokens of layer 1's experts."""
        self.now_s += 1.0
        self.source.tokens[1] += np.array(tokens or [0] * 4)
        self.planner.read()
        self._meter.show()

    def shown(self, metric: str) -> dict[str, float]:
        """Layer and other labels -> value."""
        families = text_string_to_metric_families(self.metrics.render())
        samples = [s for family in families for s in family.samples if s.name == f"moecluster_{metric}"]
        return {"/".join((s.labels["layer"], *filter(None, [s.labels.get("stat")]))): s.value for s in samples}


def test_a_layer_with_load_shows_its_skew_and_one_without_shows_nothing() -> None:
    meter = Meter()
    for _ in range(int(WINDOW_S) + 2):
        meter.pass_second(60, 20, 20, 0)
    assert meter.shown("overload_factor") == pytest.approx({"1/now": 2.4, "1/mean": 2.4, "1/worst": 2.4})
    assert meter.shown("load_entropy") == {"1": pytest.approx(0.685, abs=0.001)}
    assert meter.shown("dead_experts") == {"1": 1}
    assert meter.shown("layer_balancedness") == {"1": pytest.approx(0.625)}


def test_before_a_window_has_passed_no_expert_is_dead() -> None:
    meter = Meter()
    for _ in range(int(WINDOW_S) - 1):
        meter.pass_second(10, 0, 0, 0)
    assert meter.shown("dead_experts") == {}
    assert meter.shown("load_entropy") == {"1": 0.0}


def test_in_a_cluster_that_nobody_uses_no_expert_is_dead_and_nothing_is_uneven() -> None:
    meter = Meter()
    for _ in range(int(WINDOW_S) + 2):
        meter.pass_second(10, 10, 10, 10)
    for _ in range(2 * int(WINDOW_S)):
        meter.pass_second()
    for metric in ("dead_experts", "load_entropy", "overload_factor", "layer_balancedness"):
        assert meter.shown(metric) == {}, metric

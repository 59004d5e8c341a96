"""The routing entropy of gates, as a router measures it."""

import math

import numpy as np
import pytest

from moecluster.dispatch.routing_entropy import routing_entropy
from moecluster.metrics import Metrics
from moecluster.metrics.experts import ENTROPY_WINDOW_S


def test_entropy_is_that_of_the_scaled_weights_of_each_token() -> None:
    weights_TK = np.array(
        [[1, 1, 1, 1], [5, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0], [1, np.nan, 1, 1]], dtype=np.float32
    )
    total, tokens = routing_entropy(weights_TK)
    assert tokens == 3, "a token without weight has no entropy, nor has one that is not finite"
    assert total == pytest.approx(math.log(4) + 0.0 + math.log(2))
    scaled_total, _ = routing_entropy(3 * weights_TK[:3])
    assert scaled_total == pytest.approx(total)
    assert routing_entropy(np.zeros((0, 2), dtype=np.float32)) == (0.0, 0)


def test_the_metric_is_the_mean_of_the_last_windows() -> None:
    now_s = [0.0]
    metrics = Metrics(model="m", clock=lambda: now_s[0])

    def shown() -> float:
        (line,) = [x for x in metrics.render().splitlines() if x.startswith("moecluster_router_entropy{")]
        return float(line.split()[-1])

    assert "moecluster_router_entropy{" not in metrics.render()
    metrics.add_router_entropy(0, total=10.0, tokens=10)
    assert shown() == 1.0
    metrics.add_router_entropy(0, total=0.0, tokens=10)
    assert shown() == 0.5
    now_s[0] += ENTROPY_WINDOW_S
    metrics.add_router_entropy(0, total=40.0, tokens=20)
    assert shown() == 50.0 / 40
    now_s[0] += ENTROPY_WINDOW_S
    metrics.add_router_entropy(0, total=0.0, tokens=20)
    assert shown() == 1.0

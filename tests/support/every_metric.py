"""A value of every metric. A test asks that what is declared later is set here, too."""

import numpy as np

from moecluster.gateway.metrics import GatewayMetrics
from moecluster.metrics import Metrics
from moecluster.types import ExpertId


def set_all(metrics: Metrics, *, layers: int, experts: int) -> None:
    """One value of everything that an actor's process can show."""
    rng = np.random.default_rng(0)
    for layer in range(layers):
        metrics.count_assignments(layer, rng.integers(0, 10_000, experts))
        metrics.count_dropped(layer, 3)
        metrics.set_layer_balancedness(layer, 0.9)
        metrics.add_router_entropy(layer, total=12.0, tokens=10)
    metrics.set_replicas({ExpertId(layer=n, index=e): 1 for n in range(layers) for e in range(experts)})
    metrics.count_computed("expert-0", pairs=10, runs=2, busy_s=0.5)
    metrics.set_queue_rows("expert-0", 4)
    metrics.set_actor_speeds({"expert-0": 1.0})
    metrics.count_dispatch(transport="shm", seconds=0.01, sent_bytes=10, received_bytes=20)
    metrics.watch_lanes(lambda: {"expert-0": ("shm", False), "expert-1": ("inline", True)})
    metrics.count_retry("not_hosted")
    metrics.count_nonfinite_reply(ExpertId(layer=1, index=2), "expert-0")
    metrics.set_generation(7)
    metrics.count_operation("scale", "queued")
    metrics.observe_operation("scale", seconds=1.0)
    metrics.count_moved_bytes(100)
    metrics.count_request("stop")
    metrics.observe_first_token(0.1)
    metrics.observe_next_token(0.05)
    metrics.watch_requests(running=lambda: 1, waiting=lambda: 0)
    metrics.observe_train_step(loss=2.5, aux_losses={"load_balance": 0.02, "router_z": 0.001}, seconds=0.3)
    metrics.count_replay()


def set_all_of_a_gateway(metrics: GatewayMetrics) -> None:
    """One value of everything that a gateway can show."""
    metrics.add_model("model", "cluster")
    metrics.begin_request()
    metrics.end_request("/v1/completions", 200, model="model")
    metrics.observe_tokens("model", seconds=0.1, count=2, first=True)
    metrics.count_failover("model")
    metrics.set_routers("model", 2)

"""A value of every metric. A test asks that what is declared later is set here, too."""

from collections.abc import Sequence

import numpy as np

from moecluster.gateway.metrics import GatewayMetrics
from moecluster.metrics import Metrics
from moecluster.metrics.dispatch import LaneUse
from moecluster.metrics.operations import ClusterFigures
from moecluster.types import ActorPhase, ExpertId, OperationKind, OperationPhase, Replica

FIGURES = ClusterFigures(
    degraded=False,
    rebalancing=True,
    held=False,
    lost_experts=0,
    cold_experts=1,
    replicas_aside=0,
    routers=2,
    actors={phase.value: 1 for phase in ActorPhase},
    operation_age_s=dict.fromkeys(OperationKind, 2.0),
    plan_age_s=1.0,
    load_age_s=1.0,
)


def set_all(metrics: Metrics, *, layers: int, experts: int) -> None:
    """One value of everything that an actor's process can show."""
    set_all_of_a_router(metrics, layers=layers, experts=experts)
    set_all_of_a_controller(metrics, layers=layers, experts=experts)
    set_all_of_an_expert_actor(metrics, layers=layers, experts=experts)
    set_all_of_training(metrics)


def set_all_of_a_router(
    metrics: Metrics, *, layers: int, experts: int, actors: Sequence[str] = ("expert-0",), sick: int = 1
) -> None:
    """One value of everything that a router shows. sick: replicas that return NaN."""
    rng = np.random.default_rng(0)
    for layer in range(layers):
        metrics.count_assignments(layer, rng.integers(0, 10_000, experts))
        metrics.count_dropped(layer, 3)
        metrics.add_router_entropy(layer, total=12.0, tokens=10)
    for transport in ("shm", "inline"):
        for actor in actors:
            metrics.count_dispatch(actor=actor, transport=transport, seconds=0.01, sent_bytes=10, received_bytes=20)
    for reason in ("not_hosted", "exhausted", "stale", "unavailable", "deadline"):
        metrics.count_retry(reason)
    for i in range(sick):
        metrics.count_nonfinite_reply(ExpertId(layer=i % layers, index=i // layers), actors[0])
    metrics.watch_lanes("router", lambda: [LaneUse(actor=a, lane="inline", reason="not_shared") for a in actors])
    for status in ("stop", "length", "cancelled", "refused", "failed"):
        metrics.count_request(status)
        metrics.observe_request(status, seconds=1.0, prompt_tokens=7, cached_tokens=3)
    metrics.observe_first_token(0.1)
    metrics.observe_next_token(0.05)
    metrics.watch_requests(running=lambda: 1, waiting=lambda: 0)
    metrics.watch_attention_cache(used=lambda: 30, room=lambda: 100)


def set_all_of_a_controller(
    metrics: Metrics, *, layers: int, experts: int, actors: Sequence[str] = ("expert-0",)
) -> None:
    """One value of everything that a controller shows. Every eighth expert has two replicas, if there are actors."""
    rng = np.random.default_rng(1)
    ids = [ExpertId(layer=layer, index=e) for layer in range(layers) for e in range(experts)]
    first = [Replica(expert=each, actor=actors[i % len(actors)]) for i, each in enumerate(ids)]
    more = [Replica(expert=each, actor=actors[i % len(actors) - 1]) for i, each in enumerate(ids) if i % 8 == 0]
    metrics.set_replicas(dict.fromkeys(range(layers), experts), first if len(actors) == 1 else first + more)
    metrics.set_expert_loads({layer: rng.random(experts) for layer in range(layers)})
    for layer in range(layers):
        metrics.set_layer_balancedness(layer, 0.9)
        metrics.set_layer_skew(layer, entropy=0.8, overload=2.0, dead=1)
    metrics.set_actor_speeds(dict.fromkeys(actors, 1.0))
    metrics.set_generation(7)
    for kind in OperationKind:
        for phase in OperationPhase:
            metrics.count_operation(kind, phase.value)
        metrics.observe_operation(kind, seconds=1.0)
        metrics.set_operation_gain(kind, predicted=0.1, measured=0.05)
        metrics.count_moved_bytes(kind, 100)
    metrics.watch_cluster(lambda: FIGURES)


def set_all_of_an_expert_actor(
    metrics: Metrics, *, layers: int, experts: int, actor: str = "expert-0", held: int | None = None
) -> None:
    """One value of everything that an expert actor shows. held: experts of each layer that it holds; None: all."""
    some = list(range(experts if held is None else held))
    for layer in range(layers):
        metrics.count_replica_tokens(layer, some, [e + 1 for e in some])
    metrics.watch_replicas(actor, lambda: dict.fromkeys(range(layers), some))
    metrics.count_computed(actor, pairs=10, runs=2, busy_s=0.5)
    metrics.watch_queue(actor, lambda: 4)


def set_all_of_training(metrics: Metrics) -> None:
    """One value of everything that training shows."""
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

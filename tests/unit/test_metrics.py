import time
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from moecluster.metrics import Metrics
from moecluster.metrics.dispatch import LaneUse
from moecluster.types import ExpertId, Replica

STATS = ("now", "mean", "worst")


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels except model and cluster) -> value; asserts that every series has both."""
    found = {}
    for family in text_string_to_metric_families(metrics.render()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model") == metrics.model and labels.pop("cluster") == metrics.cluster
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


Found = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


def experts_of(found: Iterable[tuple[str, tuple[tuple[str, str], ...]]], metric: str) -> set[str]:
    return {dict(labels)["expert"] for name, labels in found if name == f"moecluster_{metric}"}


def replica_tokens(found: Found) -> dict[tuple[str, str], float]:
    """(layer, expert) -> tokens."""
    shown = {labels: value for (name, labels), value in found.items() if name == "moecluster_replica_tokens_total"}
    return {(dict(labels)["layer"], dict(labels)["expert"]): value for labels, value in shown.items()}


def test_only_the_start_is_shown_before_a_first_value() -> None:
    before_s = time.time()
    shown = samples(Metrics(model="m"))
    of_process = {"start_time_seconds", "build_info", "process_resident_memory_bytes", "process_cpu_seconds_total"}
    of_process |= {"process_open_fds", "process_threads"}
    assert {name for name, _ in shown} == {f"moecluster_{name}" for name in of_process}
    assert before_s <= shown["moecluster_start_time_seconds", ()] <= time.time()
    assert shown["moecluster_process_resident_memory_bytes", ()] > 2**20


def test_two_instances_do_not_share_values() -> None:
    one, other = Metrics(model="one"), Metrics(model="other")
    one.count_retry("not_hosted")
    assert samples(one)["moecluster_dispatch_retries_total", (("reason", "not_hosted"),)] == 1
    assert not [name for name, _ in samples(other) if "retries" in name]


def test_expert_tokens_add_up_per_layer_and_expert() -> None:
    metrics = Metrics(model="m")
    metrics.count_assignments(1, [3, 0, 2])
    metrics.count_assignments(1, [1, 1, 1])
    metrics.count_assignments(2, [5, 6, 7])
    found = samples(metrics)
    shown = {labels: value for (name, labels), value in found.items() if name == "moecluster_expert_tokens_total"}
    assert shown == {
        (("expert", str(e)), ("layer", str(layer))): value
        for layer, values in {1: (4, 1, 3), 2: (5, 6, 7)}.items()
        for e, value in enumerate(values)
    }


def test_beyond_the_cap_only_the_hottest_and_coldest_experts_and_quantiles_are_shown() -> None:
    metrics = Metrics(model="m", max_expert_series=4)
    metrics.count_assignments(0, [10, 40, 20, 30, 0])
    found = samples(metrics)
    assert experts_of(found, "expert_tokens_total") == {"0", "1", "3", "4"}
    quantiles = {
        dict(labels)["q"]: value
        for (name, labels), value in found.items()
        if name == "moecluster_expert_tokens_quantile"
    }
    assert quantiles["0.0"] == 0 and quantiles["0.5"] == 20 and quantiles["1.0"] == 40


def test_which_experts_are_shown_follows_the_last_minute_and_changes_once_a_minute() -> None:
    now_s = 1000.0
    metrics = Metrics(model="m", max_expert_series=2, clock=lambda: now_s)
    metrics.count_assignments(0, [9, 5, 0])
    assert experts_of(samples(metrics), "expert_tokens_total") == {"0", "2"}
    metrics.count_assignments(0, [0, 8, 1])
    now_s += 59.0
    assert experts_of(samples(metrics), "expert_tokens_total") == {"0", "2"}
    now_s += 1.0
    assert experts_of(samples(metrics), "expert_tokens_total") == {"1", "0"}


def test_an_actor_shows_the_replicas_that_it_holds_now() -> None:
    metrics = Metrics(model="m")
    held: dict[int, set[int]] = {3: {0, 2}}
    metrics.watch_replicas("expert-1", lambda: held)
    metrics.count_replica_tokens(3, [0, 2], [4, 7])
    assert replica_tokens(samples(metrics)) == {("3", "0"): 4, ("3", "2"): 7}
    held[3] = {2, 5}
    assert replica_tokens(samples(metrics)) == {("3", "2"): 7, ("3", "5"): 0}
    held[3] = {0}
    assert replica_tokens(samples(metrics)) == {("3", "0"): 4}  # counters never fall
    assert samples(metrics)["moecluster_hidden_replicas", (("actor", "expert-1"),)] == 0


def test_replicas_follow_the_placement() -> None:
    metrics = Metrics(model="m")
    replica = partial(Replica, expert=ExpertId(layer=0, index=0))
    metrics.set_replicas({0: 2}, [replica(actor="a")])
    metrics.set_replicas({0: 2}, [replica(actor="a", share=0.75), replica(actor="b", share=0.25)])
    found = samples(metrics)
    assert found["moecluster_expert_replicas", (("expert", "0"), ("layer", "0"))] == 2
    assert found["moecluster_expert_replicas", (("expert", "1"), ("layer", "0"))] == 0
    of = ("expert", "0"), ("layer", "0")
    assert found["moecluster_replica_share", (("actor", "a"), *of)] == 0.75
    assert found["moecluster_replica_share", (("actor", "b"), *of)] == 0.25


def test_of_a_large_placement_the_hottest_and_the_coldest_experts_are_shown() -> None:
    metrics = Metrics(model="m", max_expert_series=2)
    metrics.set_expert_loads({0: np.array([1.0, 5.0, 0.0])})
    replicas = [Replica(expert=ExpertId(layer=0, index=e), actor="a") for e in range(3)]
    metrics.set_replicas({0: 3}, [*replicas, Replica(expert=ExpertId(layer=0, index=1), actor="b", share=0.2)])
    found = samples(metrics)
    assert experts_of(found, "expert_replicas") == {"1", "2"}
    assert len([name for name, _ in found if name == "moecluster_replica_share"]) == 2  # also of 64 replicas each


def test_the_skew_of_a_layer_is_shown_now_in_the_mean_and_at_worst() -> None:
    metrics = Metrics(model="m")
    for overload in (1.0, 4.0, 1.0):
        metrics.set_layer_skew(2, entropy=0.5, overload=overload, dead=3)
    found = samples(metrics)
    factor = {stat: found["moecluster_overload_factor", (("layer", "2"), ("stat", stat))] for stat in STATS}
    assert factor == {"now": 1.0, "mean": 2.0, "worst": 4.0}
    assert found["moecluster_load_entropy", (("layer", "2"),)] == 0.5
    assert found["moecluster_dead_experts", (("layer", "2"),)] == 3
    metrics.set_layer_skew(2, entropy=None, overload=None, dead=None)
    assert not [name for name, labels in samples(metrics) if ("layer", "2") in labels]


def test_gains_show_the_last_operation_that_has_them() -> None:
    metrics = Metrics(model="m")
    metrics.set_operation_gain("reshare", predicted=0.2, measured=None)
    metrics.set_operation_gain("reshare", predicted=0.2, measured=-0.1)
    metrics.set_operation_gain("reshare", predicted=0.3, measured=None)
    shown = {labels: v for (name, labels), v in samples(metrics).items() if name == "moecluster_operation_gain"}
    kind = ("kind", "reshare")
    assert shown == {(("basis", "predicted"), kind): 0.3, (("basis", "measured"), kind): -0.1}


def test_a_connection_shows_its_lane_and_why_not_a_better_one() -> None:
    metrics = Metrics(model="m")
    lanes = [LaneUse(actor="expert-0", lane="inline", reason="not_shared")]
    metrics.watch_lanes("router", lambda: lanes)
    of = (("actor", "expert-0"), ("lane", "inline"), ("reason", "not_shared"), ("router", "router"))
    assert samples(metrics)["moecluster_transport", of] == 1
    lanes.clear()
    assert not [name for name, _ in samples(metrics) if name == "moecluster_transport"]


def test_a_dispatch_counts_its_time_and_both_directions() -> None:
    metrics = Metrics(model="m")
    metrics.count_dispatch(actor="a", transport="shm", seconds=0.003, sent_bytes=100, received_bytes=60)
    found = samples(metrics)
    assert found["moecluster_dispatch_bytes_total", (("direction", "sent"), ("transport", "shm"))] == 100
    assert found["moecluster_dispatch_bytes_total", (("direction", "received"), ("transport", "shm"))] == 60
    assert found["moecluster_dispatch_actor_messages_total", (("actor", "a"),)] == 1
    assert found["moecluster_dispatch_actor_seconds_total", (("actor", "a"),)] == 0.003
    assert found["moecluster_dispatch_seconds_sum", (("transport", "shm"),)] == 0.003
    assert found["moecluster_dispatch_seconds_bucket", (("le", "0.002"), ("transport", "shm"))] == 0
    assert found["moecluster_dispatch_seconds_bucket", (("le", "0.005"), ("transport", "shm"))] == 1


def test_an_operation_that_ends_well_moves_bytes() -> None:
    metrics = Metrics(model="m")
    metrics.count_operation("restore", "done")
    metrics.observe_operation("restore", seconds=2.0)
    metrics.count_moved_bytes("restore", 1000)
    found = samples(metrics)
    assert found["moecluster_operations_total", (("kind", "restore"), ("phase", "done"))] == 1
    assert found["moecluster_moved_bytes_total", (("kind", "restore"),)] == 1000
    assert found["moecluster_operation_seconds_sum", (("kind", "restore"),)] == 2.0


def test_speeds_of_actors_that_are_gone_are_shown_no_more() -> None:
    metrics = Metrics(model="m")
    metrics.set_actor_speeds({"a": 1.0, "b": 0.5})
    metrics.set_actor_speeds({"b": 0.6, "c": 1.0})
    shown = {labels: value for (name, labels), value in samples(metrics).items() if name == "moecluster_actor_speed"}
    assert shown == {(("actor", "b"),): 0.6, (("actor", "c"),): 1.0}


def test_texts_are_counted_when_they_are_shown() -> None:
    metrics, texts = Metrics(model="m"), {"running": 1, "waiting": 0}
    metrics.watch_requests(running=lambda: texts["running"], waiting=lambda: texts["waiting"])
    for running, waiting in ((1, 0), (4, 7)):
        texts.update(running=running, waiting=waiting)
        found = samples(metrics)
        assert found["moecluster_router_running_requests", ()] == running
        assert found["moecluster_router_waiting_requests", ()] == waiting


def test_a_layer_without_load_shows_no_balancedness() -> None:
    metrics = Metrics(model="m")
    metrics.set_layer_balancedness(0, None)
    metrics.set_layer_balancedness(1, 0.5)
    metrics.set_layer_balancedness(2, 0.25)
    metrics.set_layer_balancedness(2, None)
    shown = {labels: v for (name, labels), v in samples(metrics).items() if name == "moecluster_layer_balancedness"}
    assert shown == {(("layer", "1"),): 0.5}


def test_cross_entropy_and_auxiliary_losses_are_metrics_of_their_own() -> None:
    metrics = Metrics(model="m")
    metrics.observe_train_step(loss=2.0, aux_losses={"load_balance": 0.5, "router_z": 0.25}, seconds=1.0)
    metrics.observe_train_step(loss=1.5, aux_losses={"load_balance": 0.125}, seconds=1.0)
    found = samples(metrics)
    assert found["moecluster_train_loss", ()] == 1.5
    aux = {labels: value for (name, labels), value in found.items() if name == "moecluster_train_aux_loss"}
    assert aux == {(("loss", "load_balance"),): 0.125}

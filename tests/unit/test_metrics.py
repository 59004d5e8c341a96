import time

from prometheus_client.parser import text_string_to_metric_families

from moecluster.metrics import Metrics
from moecluster.types import ExpertId


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels except model and cluster) -> value; asserts that every series has both."""
    found = {}
    for family in text_string_to_metric_families(metrics.render()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model") == metrics.model and labels.pop("cluster") == metrics.cluster
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def test_only_the_start_is_shown_before_a_first_value() -> None:
    before_s = time.time()
    shown = samples(Metrics(model="m"))
    assert shown.keys() == {("moecluster_start_time_seconds", ())}
    assert before_s <= shown["moecluster_start_time_seconds", ()] <= time.time()


def test_two_instances_do_not_share_values() -> None:
    one, other = Metrics(model="one"), Metrics(model="other")
    one.count_retry("not_hosted")
    assert samples(one)["moecluster_dispatch_retries_total", (("reason", "not_hosted"),)] == 1
    assert samples(other).keys() == {("moecluster_start_time_seconds", ())}


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


def test_beyond_the_cap_only_the_hottest_experts_and_quantiles_are_shown() -> None:
    metrics = Metrics(model="m", max_expert_series=3)
    metrics.count_assignments(0, [10, 40, 20, 30, 0])
    found = samples(metrics)
    hottest = {dict(labels)["expert"] for name, labels in found if name == "moecluster_expert_tokens_total"}
    assert hottest == {"1", "2", "3"}
    quantiles = {
        dict(labels)["q"]: value
        for (name, labels), value in found.items()
        if name == "moecluster_expert_tokens_quantile"
    }
    assert quantiles["0.0"] == 0 and quantiles["0.5"] == 20 and quantiles["1.0"] == 40


def test_replicas_follow_the_placement() -> None:
    metrics = Metrics(model="m")
    metrics.set_replicas({ExpertId(layer=0, index=0): 1, ExpertId(layer=0, index=1): 2})
    metrics.set_replicas({ExpertId(layer=0, index=0): 3, ExpertId(layer=0, index=1): 1})
    found = samples(metrics)
    assert found["moecluster_expert_replicas", (("expert", "0"), ("layer", "0"))] == 3
    assert found["moecluster_expert_replicas", (("expert", "1"), ("layer", "0"))] == 1


def test_a_dispatch_counts_its_time_and_both_directions() -> None:
    metrics = Metrics(model="m")
    metrics.count_dispatch(transport="shm", seconds=0.003, sent_bytes=100, received_bytes=60)
    found = samples(metrics)
    assert found["moecluster_dispatch_bytes_total", (("direction", "sent"), ("transport", "shm"))] == 100
    assert found["moecluster_dispatch_bytes_total", (("direction", "received"), ("transport", "shm"))] == 60
    assert found["moecluster_dispatch_seconds_sum", (("transport", "shm"),)] == 0.003
    assert found["moecluster_dispatch_seconds_bucket", (("le", "0.002"), ("transport", "shm"))] == 0
    assert found["moecluster_dispatch_seconds_bucket", (("le", "0.005"), ("transport", "shm"))] == 1


def test_an_operation_that_ends_well_moves_bytes() -> None:
    metrics = Metrics(model="m")
    metrics.count_operation("restore", "done")
    metrics.observe_operation("restore", seconds=2.0)
    metrics.count_moved_bytes(1000)
    found = samples(metrics)
    assert found["moecluster_operations_total", (("kind", "restore"), ("phase", "done"))] == 1
    assert found["moecluster_moved_bytes_total", ()] == 1000
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
    assert aux == {(("kind", "load_balance"),): 0.125}

"""Every alert of clusters/prometheus-rules.yml fires when it should and not before, by promtool."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.clusters.prometheus_server import promtool

__all__ = ["promtool"]

RULES = Path(__file__).parents[3] / "clusters" / "prometheus-rules.yml"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule]
OF = {"model": "m", "cluster": "c"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """When an alert fires. Samples are a minute apart, in promtool's notation: "1+2x3" is 1, 3, 5, 7."""

    series: Mapping[str, str]  # name{labels besides model and cluster} -> samples
    quiet: str  # a time at which it does not fire yet
    fires: str
    summary: str
    labels: Mapping[str, str] = field(default_factory=lambda: OF)


HEALTHY = {
    "placement_generation": "7x120",
    "lost_experts": "0x120",
    'expert_actors{state="serving"}': "4x120",
    'expert_actors{state="loading"}': "0x120",
    "degraded": "0x120",
    "placement_held": "0x120",
    'layer_balancedness{layer="0"}': "0.95x120",
    'dead_experts{layer="0"}': "0x120",
    'actor_queue_rows{actor="a"}': "1500 20 2000 30 10 900 0x114",
    "router_waiting_requests": "3 0 5 0x117",
    "train_step_replays_total": "0x60 1x60",
    'operations_total{kind="reshare",phase="failed"}': "0x120",
    'operation_age_seconds{kind="scale"}': "5+60x10",
    "last_plan_age_seconds": "2x120",
    "last_load_age_seconds": "1x120",
    'operation_gain{kind="reshare",basis="predicted"}': "0.2x120",
    'operation_gain{kind="reshare",basis="measured"}': "0.15x120",
    'requests_total{status="stop"}': "0+600x120",
    'requests_total{status="failed"}': "0+1x120",
    'requests_total{status="refused"}': "0x120",
    'nonfinite_replies_total{layer="0",expert="1",actor="a"}': "0x120",
}
CASES: Mapping[str, Case] = {
    "MoeClusterControllerMissing": Case(
        series={"routers": "1x60", "placement_generation": "7x3 stale"}, quiet="8m", fires="15m", labels={},
        summary="No controller is scraped. Lost experts do not come back before one is.",
    ),
    "MoeClusterExpertsLost": Case(
        series={"lost_experts": "0 0 3x60"}, quiet="2m", fires="4m",
        summary="No actor of c serves 3 experts. Requests for them wait, then fail.",
    ),
    "MoeClusterActorLost": Case(
        series={'expert_actors{state="serving"}': "4 3x60", 'expert_actors{state="restarting"}': "0 1x60"},
        quiet="2m", fires="4m",
        summary="1 expert actors of c do not serve. moecluster status says which.",
    ),
    "MoeClusterDegraded": Case(
        series={"degraded": "0 1x60"}, quiet="5m", fires="7m",
        summary="c is degraded. /health of its gateway and moecluster status say why.",
    ),
    "MoeClusterImbalance": Case(
        series={'layer_balancedness{layer="0"}': "0.9x60", 'layer_balancedness{layer="1"}': "0.5x60"},
        quiet="14m", fires="16m",
        summary="A layer of c has a balancedness of 0.50, and the controller does not mend it. It may lack slots "
        "(controller.slots_per_layer) or a budget (controller.move_budget_bytes).",
    ),
    "MoeClusterDeadExperts": Case(
        series={'dead_experts{layer="0"}': "1x60", 'dead_experts{layer="1"}': "2x60"}, quiet="29m", fires="31m",
        summary="The gates of c send no token to 3 experts.",
    ),
    "MoeClusterQueueGrows": Case(
        series={'actor_queue_rows{actor="a"}': "0+100x60", 'actor_queue_rows{actor="b"}': "0+100x60"},
        quiet="14m", fires="20m",
        summary="The queues of the expert actors of c grow (4000 rows). It needs more actors.",
    ),
    "MoeClusterRequestsWait": Case(
        series={"router_waiting_requests": "0+2x60"}, quiet="9m", fires="20m",
        summary="More and more requests wait at the routers of c (40 now).",
    ),
    "MoeClusterStepsReplayed": Case(
        series={"train_step_replays_total": "0x5 0+1x60"}, quiet="5m", fires="36m",
        summary="Training in c ran 30 steps again in 30 minutes.",
    ),
    "MoeClusterOperationsFail": Case(
        series={'operations_total{kind="scale",phase="failed"}': "0x5 1x60"}, quiet="5m", fires="8m",
        summary="Operations scale of c fail. moecluster operations says why.", labels={**OF, "kind": "scale"},
    ),
    "MoeClusterOperationStuck": Case(
        series={'operation_age_seconds{kind="drain"}': "0+60x60"}, quiet="15m", fires="16m",
        summary="An operation drain of c has not ended for 16m 0s.", labels={**OF, "kind": "drain"},
    ),
    "MoeClusterPlanStale": Case(
        series={
            "last_plan_age_seconds": "0+60x60",
            'layer_balancedness{layer="0"}': "0.9x60",
            "placement_held": "0x60",
        },
        quiet="10m", fires="12m", summary="The controller of c has not planned for 12m 0s.",
    ),
    "MoeClusterLoadStale": Case(
        series={"last_load_age_seconds": "0+60x60"}, quiet="4m", fires="5m",
        summary="The load of c is 5m 0s old. Its source cannot be read.",
    ),
    "MoeClusterGainMissed": Case(
        series={
            'operation_gain{kind="rebalance",basis="predicted"}': "0.3x60",
            'operation_gain{kind="rebalance",basis="measured"}': "-0.1x60",
        },
        quiet="29m", fires="31m", labels={**OF, "kind": "rebalance"},
        summary="The last operation rebalance of c gained less balancedness than predicted (-0.40).",
    ),
    "MoeClusterRequestsFail": Case(
        series={'requests_total{status="stop"}': "0+95x60", 'requests_total{status="failed"}': "0+5x60"},
        quiet="5m", fires="8m", summary="More than 1 % of the requests of c fail.",
    ),
    "MoeClusterRequestsRefused": Case(
        series={'requests_total{status="refused"}': "0+5x60"}, quiet="14m", fires="18m",
        summary="The routers of c are full and refuse requests. serve.max_routers may be too low.",
    ),
    "MoeClusterNonfiniteReplies": Case(
        series={'nonfinite_replies_total{layer="3",expert="7",actor="expert-1"}': "0x5 2x60"}, quiet="5m", fires="8m",
        summary="Expert 3/7 of expert-1 replies with NaN or infinity.",
        labels={**OF, "layer": "3", "expert": "7", "actor": "expert-1"},
    ),
}  # fmt: skip


def test_every_alert_has_a_case() -> None:
    assert [alert["alert"] for alert in ALERTS] == list(CASES)
    assert all(alert["labels"]["severity"] in ("critical", "warning", "info") for alert in ALERTS)


@pytest.mark.parametrize("name", CASES)
def test_an_alert_fires_when_it_should_and_not_before(promtool: None, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    severity = next(alert["labels"]["severity"] for alert in ALERTS if alert["alert"] == name)
    fired = {"exp_labels": {**case.labels, "severity": severity}, "exp_annotations": {"summary": case.summary}}
    at: list[dict[str, Any]] = [
        {"alertname": name, "eval_time": case.quiet, "exp_alerts": []},
        {"alertname": name, "eval_time": case.fires, "exp_alerts": [fired]},
    ]
    check(tmp_path, case.series, at)


def test_nothing_fires_in_a_healthy_cluster(promtool: None, tmp_path: Path) -> None:
    times = ("6m", "20m", "60m", "119m")
    at = [{"alertname": name, "eval_time": time, "exp_alerts": []} for name in CASES for time in times]
    check(tmp_path, HEALTHY, at)


@pytest.mark.parametrize("without", ["load", "plans"])
def test_a_cluster_without_load_or_in_training_needs_no_plan(promtool: None, tmp_path: Path, without: str) -> None:
    series = dict(CASES["MoeClusterPlanStale"].series)
    if without == "load":
        del series['layer_balancedness{layer="0"}']
    else:
        series["placement_held"] = "1x60"
    check(tmp_path, series, [{"alertname": "MoeClusterPlanStale", "eval_time": "50m", "exp_alerts": []}])


def check(folder: Path, series: Mapping[str, str], alerts: Sequence[Mapping[str, Any]]) -> None:
    """Lets promtool compare what fires with what is expected."""
    inputs = [{"series": _full_name(name), "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "alert_rule_test": list(alerts)}
    content = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}
    (folder / "test.yml").write_text(json.dumps(content))  # JSON is YAML
    done = subprocess.run(
        ["promtool", "test", "rules", str(folder / "test.yml")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _full_name(name: str) -> str:
    base, _, labels = name.partition("{")
    return f'moecluster_{base}{{model="m",cluster="c"{"," + labels if labels else "}"}'

"""The examples that need no cluster. Those that need one run in tests/cluster (test_cli.py, test_serve.py)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from examples.custom_policy import LazyPolicy, main
from moecluster.cli.app import app
from moecluster.http_client.batch.lines import BatchInput
from moecluster.placement.layout import Fleet, make_layout
from moecluster.placement.policy.interface import Observation

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def test_a_policy_is_replayed_beside_the_built_in_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(EXAMPLES / "loads.jsonl")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["policy", "balancedness", "worst", "moved", "MB"]
    figures = {name: [float(value) for value in values] for name, *values in map(str.split, lines)}
    assert list(figures) == ["lazy", "static", "eplb", "share"]
    assert figures["static"][2] == 0  # moves nothing
    assert all(0 < worst <= mean <= 1 for mean, worst, _ in figures.values())
    assert figures["share"][0] >= figures["static"][0]


def test_a_missing_trace_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl: cannot be read" in capsys.readouterr().err


def test_the_policy_acts_only_when_balance_is_lost() -> None:
    policy = LazyPolicy(enough=0.9)
    fleet = Fleet(slots_A=np.array([2, 2]), speed_A=np.ones(2), node_A=np.arange(2), expert_bytes_L=np.array([1000.0]))
    replicas = {"layer_R": np.zeros(3, int), "expert_R": np.array([0, 0, 1]), "actor_R": np.array([0, 1, 1])}
    layout = make_layout(np.array([2]), **replicas, share_R=np.array([0.75, 0.25, 1.0]))
    seen = Observation(now_s=0.0, load_LE=np.array([[2.0, 1.0]]), fleet=fleet, layout=layout, budget_bytes=1e6)
    kept, state = policy.decide(seen, policy.first_state())  # 1.5 on both actors
    assert kept.layout is layout and kept.reason == "balanced enough"
    changed, _ = policy.decide(dataclasses.replace(seen, load_LE=np.array([[2.0, 0.0]])), state)
    np.testing.assert_allclose(changed.layout.share_R, [0.5, 0.5, 1.0])
    assert changed.moved_bytes == 0 and changed.balancedness_after == pytest.approx(1.0)


def test_settings_for_own_text_describe_a_model() -> None:
    shown = CliRunner().invoke(app, ["params", str(EXAMPLES / "own_text.toml")], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    assert "experts per layer, active per token" in shown.output and "8, 2" in shown.output


def test_the_batch_file_is_well_formed() -> None:
    with BatchInput(EXAMPLES / "requests.jsonl") as requests:
        lines = [requests.line(index) for index in range(len(requests))]
    assert [line.custom_id for line in lines] == ["function", "import", "two-samples"]
    assert not any(line.problem for line in lines)

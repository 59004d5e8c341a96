"""The simulator's costs are fitted to the benchmark, and reproduce it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import layer_inputs
from moecluster.errors import ConfigError
from moecluster.simulation import costs as costs_module
from moecluster.simulation.costs import Costs, calibrated

RESULT = Path(__file__).parents[3] / "benchmarks" / "results" / "layer.json"


def test_costs_explain_the_benchmark_that_they_come_from() -> None:
    costs = calibrated(RESULT)
    rows = {row["name"]: row["value"] for row in json.loads(RESULT.read_text())["rows"]}
    for tokens in (1, 16, 256, 2048):
        touched = float(costs_module.touched(np.array(float(tokens))))
        predicted_s = costs.message_s + touched * costs.expert_s + tokens * costs.row_s
        measured_s = rows[f"ours: forward, bfloat16, {tokens} tokens, shm"] / 1e3
        assert predicted_s == pytest.approx(measured_s, rel=0.35)


def test_costs_know_the_layer_of_the_benchmark() -> None:
    assert costs_module.BENCH_WIDTH == layer_inputs.D_MODEL
    assert costs_module.BENCH_INNER == layer_inputs.D_INNER
    assert (costs_module.BENCH_EXPERTS, costs_module.BENCH_TOP_K) == (layer_inputs.NUM_EXPERTS, layer_inputs.TOP_K)


def test_calibration_finds_what_made_the_figures(tmp_path) -> None:
    made = Costs(message_s=2e-3, expert_s=5e-4, row_s=1e-5, link_bytes_per_s=1e9)
    tokens_to_actor = 1 - 6 / 28  # the actor holds 4 of 8 experts; top-2
    rows = []
    for tokens in (1, 16, 256, 2048):
        shared_s = made.message_s + 4 * (1 - 0.75**tokens) * made.expert_s + tokens * made.row_s
        inline_s = shared_s + tokens * tokens_to_actor * made.row_bytes / made.link_bytes_per_s
        for transport, seconds in (("shm", shared_s), ("inline", inline_s)):
            name = f"ours: forward, bfloat16, {tokens} tokens, {transport}"
            rows.append({"name": name, "value": 1e3 * seconds, "unit": "ms"})
    (tmp_path / "layer.json").write_text(json.dumps({"rows": rows}))
    found = calibrated(tmp_path / "layer.json")
    for field in dataclasses.fields(Costs):
        assert getattr(found, field.name) == pytest.approx(getattr(made, field.name), rel=1e-6)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read"), ("{", "no result of benchmarks/layer.py"), ('{"rows": []}', "has 0 batch sizes")],
)
def test_a_file_without_costs(tmp_path, content, expected) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        calibrated(tmp_path / "x.json")


@pytest.mark.parametrize("wrong", [{"row_s": 0.0}, {"message_s": -1.0}, {"link_bytes_per_s": float("inf")}])
def test_costs_that_cannot_be(wrong) -> None:
    with pytest.raises(ConfigError, match=f"cost {next(iter(wrong))}: got"):
        dataclasses.replace(Costs(), **wrong)

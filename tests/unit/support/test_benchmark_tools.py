"""The benchmarks' own tools: their timing, comparison and output."""

import json
import time

import pytest
import torch

from benchmarks.case import Case
from benchmarks.layer_inputs import D_MODEL, NUM_EXPERTS, TOP_K, make_batches
from benchmarks.measure import Contender, ContenderFailed, running, speed_ratios
from benchmarks.report import Report, Row, installed_versions
from benchmarks.workers.loop import time_runs


def test_row_is_judged_by_its_median_in_the_direction_of_better():
    runs = [0.7, 0.9, 0.8, 5.0, 0.1]
    assert Row(name="speed", runs=runs, unit="x", target=0.8).met is True
    assert Row(name="speed", runs=runs, unit="x", target=0.81).met is False
    assert Row(name="time", runs=runs, unit="ms", target=0.81, better="lower").met is True
    assert Row(name="time", runs=runs, unit="ms").met is None


def test_report_file_has_exactly_the_agreed_form(tmp_path):
    rows = [Row(name="speed", runs=[1.0, 2.0, 3.0], unit="x", target=1.5)]
    path = Report(name="sample", rows=rows, raw=[1, 2], versions=installed_versions()).write(tmp_path)
    written = json.loads(path.read_text())
    assert path.name == "sample.json"
    assert list(written) == ["name", "date", "machine", "versions", "rows", "raw"]
    assert written["rows"] == [
        {"name": "speed", "value": 2.0, "unit": "x", "target": 1.5, "better": "higher", "met": True}
    ]
    assert written["raw"] == {"spread": {"speed": {"min": 1.0, "median": 2.0, "max": 3.0}}, "measured": [1, 2]}
    assert written["versions"]["torch"] == torch.__version__
    assert set(written["machine"]) == {"cpu", "instruction_sets", "cores", "memory_gib", "system"}


def test_time_runs_gives_seconds_per_call():
    call_s, run_s, runs = 0.002, 0.02, 3
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(call_s)

    seconds = time_runs(call, runs=runs, min_run_s=run_s)
    assert len(seconds) == runs
    assert all(call_s <= s < run_s for s in seconds)
    assert calls > runs


def test_speed_ratio_is_the_baselines_time_over_our_own():
    assert speed_ratios([1.0, 2.0], [2.0, 2.0]) == [2.0, 1.0]


def test_batches_are_equal_for_all_contenders_and_differ_from_each_other():
    case = Case(tokens=5, dtype="bfloat16")
    ours, theirs = make_batches(case), make_batches(case)
    for one, same in zip(ours, theirs, strict=True):
        assert torch.equal(one.x_TD, same.x_TD) and torch.equal(one.ids_TK, same.ids_TK)
        assert one.x_TD.shape == one.grad_TD.shape == (5, D_MODEL) and one.x_TD.dtype == torch.bfloat16
        assert one.ids_TK.shape == (5, TOP_K) and one.ids_TK.min() >= 0 and one.ids_TK.max() < NUM_EXPERTS
        assert (one.ids_TK[:, 0] != one.ids_TK[:, 1]).all()
        torch.testing.assert_close(one.weights_TK.sum(-1), torch.ones(5))
    assert not torch.equal(ours[0].x_TD, ours[1].x_TD)


def test_contender_that_ends_is_reported_with_its_last_words():
    missing = Contender(name="missing", module="benchmarks.workers.no_such_module")
    with running(missing) as worker, pytest.raises(ContenderFailed, match=r"missing ended: .*no_such_module"):
        worker.measure(Case(tokens=1, dtype="float32"), min_run_s=0.01)

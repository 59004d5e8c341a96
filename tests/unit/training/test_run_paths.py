"""The paths of a run hold in another working directory, and events come back as they were sent."""

import json
import math
from pathlib import Path

import pytest

from moecluster.config import read_config
from moecluster.errors import ConfigError
from moecluster.training.events import (
    CheckpointWritten,
    Evaluated,
    StepDone,
    WentBack,
    decode_event,
    encode_event,
)
from moecluster.training.run_paths import run_paths, with_absolute_paths


def test_paths_become_absolute_and_what_is_no_path_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    relative = read_config({"train": {"output_dir": "runs/a", "data": "texts", "tokenizer": "bytes"}})
    config = with_absolute_paths(relative)
    assert run_paths(config, "/start") == (
        "/start", f"{tmp_path}/runs/a", f"{tmp_path}/texts", f"{tmp_path}/bytes",
    )  # fmt: skip
    assert with_absolute_paths(config) == config
    plain = with_absolute_paths(read_config({"train": {"output_dir": "/runs"}}))
    assert (plain.train.data, plain.train.tokenizer, plain.model.path) == ("stdlib", "", "")
    assert run_paths(plain) == ("/runs",)
    with pytest.raises(ConfigError, match=r"train\.output_dir: got runs/a, expected an absolute path"):
        run_paths(relative)


@pytest.mark.parametrize(
    "event",
    [
        StepDone(
            step=3, loss=1.5, aux_losses={"load": 0.1}, learning_rate=1e-3, grad_norm=2.0, seconds=0.5,
            tokens_per_s=10.0, balancedness=None, attempts=1,
        ),
        Evaluated(step=3, bits_per_byte=2.5, domains={"code": 2.0}),
        CheckpointWritten(step=3, path="/runs/step-3", seconds=0.1),
        WentBack(from_step=3, step=2, reason="lost", seconds=1.0),
    ],
)  # fmt: skip
def test_events_come_back_as_they_were_sent(event) -> None:
    assert decode_event(encode_event(event)) == event
    assert "\n" not in encode_event(event)


def test_a_loss_that_is_no_number_is_told_too() -> None:
    record = json.loads(encode_event(Evaluated(step=1, bits_per_byte=math.nan, domains={})))
    back = decode_event(json.dumps(record))
    assert isinstance(back, Evaluated) and math.isnan(back.bits_per_byte)


@pytest.mark.parametrize("line", ["", "3", "[]", "{}", '{"event": "Odd"}', '{"event": []}', '{"event": "Evaluated"}'])
def test_what_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        decode_event(line)

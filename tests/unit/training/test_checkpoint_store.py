"""Checkpoints appear under their names only when complete; files are written in chunks."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.files import FolderFiles
from moecluster.models.checkpoint.training_progress import (
    TrainingState,
    read_step,
    read_training_state,
    write_training_state,
)
from moecluster.models.checkpoint.training_state import read_optimizer_state
from moecluster.training.checkpoint_store import CheckpointStore
from moecluster.training.tensor_file import TensorFile, write_tensors
from moecluster.types import ExpertId

STATE = TrainingState(step=7, data_position=112, term=3, settings={"train.seed": 1})


def fill(directory: Path) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "file").write_text("content")


def test_a_checkpoint_is_there_when_it_is_complete(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.latest() is None and store.steps() == []
    seen = []

    def watching(directory: Path) -> None:
        fill(directory)
        seen.append(store.steps())

    path = store.write(5, watching)
    assert seen == [[]] and store.latest() == path
    assert (path / "sub" / "file").read_text() == "content"


def test_what_fails_half_way_leaves_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    store.write(5, fill)

    def failing(directory: Path) -> None:
        fill(directory)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        CheckpointError, match=r"step 6 could not be written.*No space left on device.*output_dir"
    ) as caught:
        store.write(6, failing)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"]


def test_the_last_ones_are_kept(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 20, 300):
        store.write(step, fill)
    (tmp_path / ".partial-00000400").mkdir()
    (tmp_path / "notes").mkdir()
    store.prune(keep=2)
    assert store.steps() == [20, 300]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "step-00000020", "step-00000300"]


def test_a_step_can_be_written_again(tmp_path):
    store = CheckpointStore(tmp_path)
    store.write(5, fill)
    path = store.write(5, lambda directory: (directory / "new").touch())
    assert [entry.name for entry in path.iterdir()] == ["new"] and store.steps() == [5]


def test_training_state_comes_back(tmp_path):
    assert read_training_state(tmp_path) is None and read_step(tmp_path) is None
    write_training_state(tmp_path, STATE)
    assert read_training_state(tmp_path) == STATE and read_step(tmp_path) == 7


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"step": 1}), json.dumps({"surprise": 1})])
def test_a_torn_training_state_is_named(tmp_path, content):
    write_training_state(tmp_path, STATE)
    (tmp_path / "training" / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_step(tmp_path)


def test_optimizer_state_by_expert(tmp_path):
    expert = ExpertId(layer=2, index=1)
    assert read_optimizer_state(FolderFiles(tmp_path), expert) is None
    (tmp_path / "training").mkdir()
    tensors = {"1/step/w": torch.tensor(3.0), "1/exp_avg/w": torch.ones(2), "10/exp_avg/w": torch.zeros(2)}
    path = tmp_path / "training" / "optimizer-layer-002.safetensors"
    write_tensors(path, tensors)
    state = read_optimizer_state(FolderFiles(tmp_path), expert)
    assert state is not None and {name: value.tolist() for name, value in state.items()} == {
        "step/w": 3.0,
        "exp_avg/w": [1.0, 1.0],
    }
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="torn"):
        read_optimizer_state(FolderFiles(tmp_path), expert)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_what_was_written(tmp_path, dtype):
    tensors = {
        "matrix": torch.arange(6).reshape(2, 3).to(dtype),
        "transposed": torch.arange(6).reshape(2, 3).T.to(dtype),
        "scalar": torch.tensor(7).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    size = write_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == dtype for name, value in tensors.items())
    assert size == 13 * dtype.itemsize


def test_rows_come_in_any_order_and_what_never_comes_is_zero(tmp_path):
    path = tmp_path / "x.safetensors"
    rows = torch.randn(3, 4, 5)
    shapes = {"rows": (3, 4, 5), "never": (2,)}
    with TensorFile(path, shapes, dict.fromkeys(shapes, torch.float32), by_row=("rows",)) as file:
        for row in (2, 0):
            file.write("rows", rows[row : row + 1], row=row)
    loaded = load_file(path)
    assert torch.equal(loaded["rows"][[0, 2]], rows[[0, 2]])
    assert not loaded["rows"][1].any() and not loaded["never"].any()


def test_the_shape_announced_is_the_shape_written(tmp_path):
    with (
        TensorFile(tmp_path / "x.safetensors", {"a": (2, 3)}, {"a": torch.float32}) as file,
        pytest.raises(AssertionError, match="into"),
    ):
        file.write("a", torch.zeros(3, 2))

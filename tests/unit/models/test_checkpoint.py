"""Checkpoint directories that are missing, torn or of another shape: one clear line each, before building anything."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecluster.errors import CheckpointError, UnsupportedModelError
from moecluster.models.checkpoint.reader import INDEX_NAME, SINGLE_FILE_NAME, Checkpoint
from moecluster.models.experts.source import ExpertSource
from moecluster.models.trunk import load_trunk
from moecluster.types import ExpertId
from tests.support.models.families import make_model, save
from tests.support.models.parity import no_experts

GATE_KEY = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
NORM_KEY = "model.norm.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Mixtral in three layouts: keys per expert, fused, and per expert in many shards."""
    root = tmp_path_factory.mktemp("mixtral")
    model = make_model("mixtral")
    save(model, root / "per-expert", "per-expert")
    save(model, root / "fused", "fused")
    model.save_pretrained(root / "sharded", max_shard_size="40KB")
    return root


@pytest.fixture
def directory(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "per-expert", tmp_path / "model"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE_FILE_NAME)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE_NAME, metadata={"format": "pt"})


def test_the_two_layouts_have_different_keys(originals: Path) -> None:
    assert GATE_KEY in Checkpoint.open(originals / "per-expert").tensors
    fused = Checkpoint.open(originals / "fused").tensors
    assert GATE_KEY not in fused
    assert fused["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 96, 32)


def test_shards_hold_what_the_single_file_holds(originals: Path) -> None:
    single, sharded = Checkpoint.open(originals / "per-expert"), Checkpoint.open(originals / "sharded")
    assert len({info.file for info in sharded.tensors.values()}) > 3
    assert single.tensors.keys() == sharded.tensors.keys()
    for key in single.tensors:
        assert torch.equal(single.read(key), sharded.read(key))


def test_a_row_is_read_without_the_others(originals: Path) -> None:
    checkpoint = Checkpoint.open(originals / "fused")
    key = "model.layers.1.mlp.experts.down_proj"
    whole = checkpoint.read(key)
    row = checkpoint.read(key, row=2)
    assert torch.equal(row, whole[2:3])
    assert row.untyped_storage().nbytes() == checkpoint.info(key).num_bytes // 4


@pytest.mark.parametrize("layout", ["per-expert", "fused", "sharded"])
def test_an_expert_is_the_same_in_every_layout(originals: Path, layout: str) -> None:
    expert = ExpertId(layer=1, index=3)
    ours = ExpertSource(originals / layout).load(expert, torch.bfloat16).state_dict()
    theirs = make_model("mixtral").get_submodule("model.layers.1.mlp.experts")
    assert list(ours) == ["gate_up_proj", "down_proj"]
    for name, value in ours.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, theirs.get_parameter(name)[3].to(torch.bfloat16))


def test_missing_directory_config_and_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model directory at .*nowhere"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"pickled \.bin weights only"):
        Checkpoint.open(tmp_path)


def test_a_file_cut_anywhere_is_torn(directory: Path) -> None:
    file = directory / SINGLE_FILE_NAME
    whole = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 7, 8, 100, header_end - 1, header_end, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is torn"):
            Checkpoint.open(directory)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="is torn"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    "header",
    [b"not json at all", b"[1, 2]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [2]}}', b'{"a": {"data_'],
)
def test_a_header_of_something_else_is_torn(directory: Path, header: bytes) -> None:
    (directory / SINGLE_FILE_NAME).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="is torn"):
        Checkpoint.open(directory)


def test_an_index_that_misses_a_shard_or_is_torn(sharded: Path) -> None:
    index = sharded / INDEX_NAME
    content = json.loads(index.read_text())
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        Checkpoint.open(sharded)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="shards stand beside their index"):
        Checkpoint.open(sharded)
    whole_but_for_metadata = json.dumps({"weight_map": content["weight_map"]})
    unfit = '{"metadata": {}, "weight_map": {"a": 1}}'
    for torn in ("", "[]", unfit, whole_but_for_metadata, json.dumps(content)[:50]):
        index.write_text(torn)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json (is torn|cannot be used)"):
            Checkpoint.open(sharded)


def test_an_index_that_promises_what_nobody_needs(sharded: Path) -> None:
    index = sharded / INDEX_NAME
    content = json.loads(index.read_text())
    content["weight_map"]["promised.weight"] = content["weight_map"][NORM_KEY]
    index.write_text(json.dumps(content))
    load_trunk(sharded, no_experts)
    rewritten = sharded / content["weight_map"][NORM_KEY]
    tensors = load_file(rewritten)
    del tensors[NORM_KEY]
    save_file(tensors, rewritten, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no model\.norm\.weight"):
        load_trunk(sharded, no_experts)


def test_a_missing_trunk_weight_is_not_made_up(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.pop(NORM_KEY))
    with pytest.raises(CheckpointError, match=r"has no model\.norm\.weight"):
        load_trunk(directory, no_experts)


def test_a_trunk_weight_of_another_shape(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({NORM_KEY: torch.zeros(31)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in .* has shape \[31\], .* \[32\]"):
        load_trunk(directory, no_experts)


def test_a_missing_expert_weight_is_not_made_up(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.pop(GATE_KEY))
    source = ExpertSource(directory)
    with pytest.raises(CheckpointError, match=r"3 of 4 experts' keys for .*gate_up_proj"):
        source.load(ExpertId(layer=0, index=2))
    assert source.load(ExpertId(layer=1, index=2)) is not None


@pytest.mark.parametrize("shape", [(48, 31), (47, 32), (5,)])
def test_an_expert_weight_of_another_shape(directory: Path, shape: tuple[int, ...]) -> None:
    rewrite(directory, lambda tensors: tensors.update({GATE_KEY: torch.zeros(shape)}))
    with pytest.raises(CheckpointError, match="expert 0/1"):
        ExpertSource(directory).load(ExpertId(layer=0, index=1))


def test_a_fused_weight_with_too_few_experts(originals: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(originals / "fused", tmp_path / "fused"))
    key = "model.layers.0.mlp.experts.down_proj"
    rewrite(directory, lambda tensors: tensors.update({key: tensors[key][:3].clone()}))
    with pytest.raises(CheckpointError, match=r"has shape \[3, 32, 48\]: 4 experts expected first"):
        ExpertSource(directory).load(ExpertId(layer=0, index=3))


@pytest.mark.parametrize(
    "expert", [ExpertId(layer=0, index=4), ExpertId(layer=2, index=0), ExpertId(layer=0, index=-1)]
)
def test_an_expert_that_the_model_has_not(directory: Path, expert: ExpertId) -> None:
    with pytest.raises(CheckpointError, match=r"has no expert .*: its layers are 0 \(4 experts\), 1 \(4 experts\)"):
        ExpertSource(directory).load(expert)


def test_quantized_weights_that_nothing_tells_how_to_read_are_refused(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({GATE_KEY: tensors[GATE_KEY].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=r"is F8_E4M3, without scales that config\.json tells of: only float32"):
        ExpertSource(directory).load(ExpertId(layer=0, index=1))
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="is quantized by 'gptq': give a checkpoint in float32"):
        ExpertSource(directory)
    with pytest.raises(UnsupportedModelError, match="is quantized by 'gptq'"):
        load_trunk(directory, no_experts)


def test_integers_are_read_as_they_are(directory: Path) -> None:
    stored = {"ids": torch.arange(6).view(2, 3), "mask": torch.tensor([True, False]), "one": torch.tensor(7)}
    rewrite(directory, lambda tensors: tensors.update(stored))
    checkpoint = Checkpoint.open(directory)
    for key, value in stored.items():
        found = checkpoint.read_stored(key)
        assert found.dtype == value.dtype and torch.equal(found, value)
    with pytest.raises(CheckpointError, match=r"ids in .* is I64"):
        checkpoint.read("ids")


@pytest.mark.parametrize("kept_bytes", [None, 5000])
def test_a_file_that_is_written_anew_while_it_is_read(directory: Path, kept_bytes: int | None) -> None:
    checkpoint = Checkpoint.open(directory)
    file = directory / SINGLE_FILE_NAME
    content = file.read_bytes()[:kept_bytes]
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since it was opened: write new weights"):
        load_trunk(checkpoint, no_experts)

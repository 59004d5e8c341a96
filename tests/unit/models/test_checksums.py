"""Every reader detects damaged bytes in this project's checkpoints; other files are read without checks."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.files import FolderFiles
from moecluster.models.checkpoint.headers import read_header, read_headers
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.checkpoint.training_progress import TrainingState, read_training_state
from moecluster.models.checkpoint.training_state import CARRIED_NAME, read_optimizer_state, read_trunk_optimizer_state
from moecluster.models.experts.layout import ExpertLayout
from moecluster.models.experts.source import ExpertSource
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.models.trunk import load_trunk
from moecluster.models.update.compose import compose
from moecluster.rpc.expert.interface import ExportedTensor
from moecluster.training.checkpoint_writer import CheckpointContent, fill_checkpoint
from moecluster.types import ExpertId, OptimizerSettings
from tests.support.models.families import make_model
from tests.support.models.parity import no_experts

ADAM = OptimizerSettings(name="adamw", beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, momentum=0.0)


def write(directory: Path, source: Path, model: PreTrainedModel) -> Path:
    """Writes a training checkpoint at step 3 from `source`."""
    experts = ExpertSource(source)
    trunk = load_trunk(source, no_experts)

    def export(wanted: "list[ExpertId]") -> Iterator[ExportedTensor]:
        for expert in wanted:
            for name, value in experts.load(expert).named_parameters():
                yield ExportedTensor(expert=expert, name=name, value=value.detach())
                for kind in ("exp_avg", "exp_avg_sq"):
                    yield ExportedTensor(expert=expert, name=f"optimizer/{kind}/{name}", value=value.detach() + 1)

    directory.mkdir(parents=True)
    content = CheckpointContent(
        state=TrainingState(step=3, data_position=12, term=1, settings={"train.seed": 0.1}),
        trunk=trunk,
        tokenizer=build_byte_tokenizer(),
        layout=ExpertLayout(trunk.config),
        expert_dtype=torch.float32,
        export=export,  # type: ignore[arg-type]
        optimizer=ADAM,
        trunk_optimizer={"exp_avg/a": torch.randn(3, 4), "step": torch.tensor(3.0)},
        carried_from=source,
    )
    fill_checkpoint(directory, content)
    return directory


@pytest.fixture(scope="module", params=["phimoe", "gpt_oss"])  # keys for every expert, and fused ones
def written(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sums")
    model = make_model(request.param)
    model.save_pretrained(root / "source")
    return write(root / "ours", root / "source", model)


def read_everything(directory: Path) -> None:
    source = ExpertSource(directory)
    for layer in source.layers:
        for index in range(layer.num_experts):
            source.load(ExpertId(layer=layer.layer, index=index))
            read_optimizer_state(FolderFiles(directory), ExpertId(layer=layer.layer, index=index))
    load_trunk(directory, no_experts)
    read_trunk_optimizer_state(directory)


def flip(file: Path, at: int, zeros: int = 0) -> bytes:
    """Flips one bit, or zeroes bytes; returns the original content."""
    whole = file.read_bytes()
    changed = bytearray(whole)
    if zeros:
        changed[at : at + zeros] = bytes(zeros)
    else:
        changed[at] ^= 0x10
    file.write_bytes(changed)
    return whole


def test_every_damaged_tensor_of_ours_is_named(written: Path) -> None:
    read_everything(written)
    files = sorted(written.rglob("*.safetensors"))
    assert len(files) == 6  # trunk, two layers of experts, and the optimizer's state of each
    for file in files:
        infos = read_header(FolderFiles(file.parent), file.name, file.stat().st_size)
        tensors = load_file(file)
        for key, info in list(infos.items())[:: max(len(infos) // 4, 1)]:
            for at, zeros in ((info.begin, 0), (info.begin + info.num_bytes - 1, 0), (info.begin, info.num_bytes)):
                if zeros and not tensors[key].any():
                    continue
                whole = flip(file, at, zeros)
                with pytest.raises(
                    CheckpointError, match=rf"{file} is damaged: the bytes of {key}(, row \d+)? are not"
                ):
                    read_everything(written)
                file.write_bytes(whole)
    read_everything(written)


def test_a_row_is_checked_by_itself(written: Path) -> None:
    source = ExpertSource(written)
    (key, row), *_ = source.reads(ExpertId(layer=0, index=2))
    info = source.checkpoint.info(key)
    size = info.num_bytes // (1 if row is None else info.shape[0])
    whole = flip(info.file, read_headers(FolderFiles(written))[key].begin + (row or 0) * size + size // 2)
    source = ExpertSource(written)
    for index in (0, 1, 3):
        source.load(ExpertId(layer=0, index=index))
    with pytest.raises(CheckpointError, match="is damaged"):
        source.load(ExpertId(layer=0, index=2))
    info.file.write_bytes(whole)


def test_a_damaged_header_and_a_damaged_state_are_found(written: Path) -> None:
    file = written / "model-trunk.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(CheckpointError, match="is torn: its safetensors header"):
        Checkpoint.open(written)
    file.write_bytes(whole)
    state = written / "training" / "state.json"
    text = state.read_text()
    state.write_text(text.replace('"step": 3', '"step": 2'))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        read_training_state(written)
    state.write_text(text)
    found = read_training_state(written)
    assert found is not None and (found.step, found.settings) == (3, {"train.seed": 0.1})
    content = json.loads(text)
    del content["crc32"]  # as written before checksums existed
    state.write_text(json.dumps(content))
    assert read_training_state(written) == found
    state.write_text(text)


def test_a_file_that_another_wrote_over_ours_is_read_unchecked(written: Path, tmp_path: Path) -> None:
    file = written / "model-trunk.safetensors"
    whole = file.read_bytes()
    save_file(load_file(file), file, metadata={"format": "pt"})
    read_everything(written)
    file.write_bytes(whole)


def test_what_is_put_together_is_checked_too_and_so_is_what_it_is_made_of(written: Path, tmp_path: Path) -> None:
    foreign = written.parent / "source"
    out = tmp_path / "out"
    compose(foreign, foreign, out, experts={ExpertId(layer=0, index=1)}, keep_trunk=True)
    compose(written, written, tmp_path / "both", experts={ExpertId(layer=0, index=1)}, keep_trunk=True)
    for directory in (out, tmp_path / "both"):
        infos = read_headers(FolderFiles(directory))
        summed = {key: info for key, info in infos.items() if info.checksums is not None}
        assert directory == out or summed.keys() == infos.keys()
        for info in list(summed.values())[::9]:
            whole = flip(info.file, info.begin + info.num_bytes // 2)
            with pytest.raises(CheckpointError, match="is damaged"):
                source = ExpertSource(directory)
                for layer in source.layers:
                    for index in range(layer.num_experts):
                        source.load(ExpertId(layer=layer.layer, index=index))
                load_trunk(directory, no_experts)
            info.file.write_bytes(whole)


def test_layers_that_training_does_not_know_stay_as_they_are(tmp_path: Path) -> None:
    model = make_model("deepseek_v3", num_nextn_predict_layers=1)
    source = tmp_path / "source"
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    further = {
        "model.layers.3.eh_proj.weight": torch.randn(8, 4).to(torch.bfloat16),
        "model.layers.3.mlp.experts.0.gate_proj.weight": torch.randn(24, 32),
        "model.layers.3.count": torch.tensor([3], dtype=torch.uint16),
        "model.layers.3.scales": torch.randn(4).to(torch.float8_e5m2),
    }
    save_file(tensors | further, source / "model.safetensors", metadata={"format": "pt"})
    first = write(tmp_path / "first", source, model)
    second = write(tmp_path / "second", first, model)
    for directory in (first, second):
        carried = load_file(directory / CARRIED_NAME)
        assert carried.keys() == further.keys()
        assert all(torch.equal(carried[k].view(torch.uint8), further[k].view(torch.uint8)) for k in further)
        index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        assert {key for key, name in index.items() if name == CARRIED_NAME} == further.keys()
        assert json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"] == 1
        read_everything(directory)
    assert (first / CARRIED_NAME).stat().st_ino == (second / CARRIED_NAME).stat().st_ino
    plain = tmp_path / "plain"
    make_model("deepseek_v3").save_pretrained(plain)
    assert not (write(tmp_path / "third", plain, model) / CARRIED_NAME).exists()

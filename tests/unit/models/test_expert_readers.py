"""Experts read without transformers equal those read through it; unsupported ones fall back to it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecluster.errors import CheckpointError, UnsupportedModelError
from moecluster.models.checkpoint.reader import SINGLE_FILE_NAME, Checkpoint
from moecluster.models.experts.family import FamilyExperts
from moecluster.models.experts.source import ExpertSource
from moecluster.models.experts.swiglu import NAMINGS, SwigluExperts, swiglu_experts
from moecluster.types import ExpertId
from tests.support.models.families import LAYOUTS, Layout, make_model, save

EXPERT = ExpertId(layer=1, index=3)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Layout], Path]:
    """The directory of a family's tiny model, written once."""

    def directory(family: str, layout: Layout) -> Path:
        found = tmp_path_factory.getbasetemp() / f"{family}-{layout}"
        if not found.is_dir():
            save(make_model(family), found, layout)
        return found

    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Mixtral of this test alone, with keys per expert."""
    save(make_model("mixtral"), tmp_path, "per-expert")
    return tmp_path


def change_config(directory: Path, **settings: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE_FILE_NAME)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE_NAME, metadata={"format": "pt"})


def read(directory: Path) -> SwigluExperts | None:
    return swiglu_experts(Checkpoint.open(directory))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", NAMINGS)
def test_an_expert_is_the_one_that_transformers_makes(
    stored: Callable[[str, Layout], Path], family: str, layout: Layout
) -> None:
    """Equal layers, sizes, parameter order, and outputs, bit for bit."""
    checkpoint = Checkpoint.open(stored(family, layout))
    ours, theirs = swiglu_experts(checkpoint), FamilyExperts(checkpoint)
    assert ours is not None
    assert ours.layers == theirs.layers
    x_nD = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        expert, reference = ours.load(EXPERT, dtype), theirs.load(EXPERT, dtype)
        parameters, expected = dict(expert.named_parameters()), dict(reference.named_parameters())
        assert list(parameters) == list(expected)
        assert all(torch.equal(parameters[name], value) for name, value in expected.items())
        assert torch.equal(expert(x_nD.to(dtype)), reference(x_nD.to(dtype)))
    assert ours.expert_bytes(EXPERT) == theirs.expert_bytes(EXPERT) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_beyond_the_model_are_left_out(
    stored: Callable[[str, Layout], Path], tmp_path: Path, layout: Layout
) -> None:
    """DeepSeek-V3 and GLM-4.5 have a layer for multi-token prediction after the last one."""
    tensors = load_file(stored("deepseek_v3", layout) / SINGLE_FILE_NAME)
    further = {
        key.replace("layers.2.", "layers.3."): value.clone() for key, value in tensors.items() if "layers.2." in key
    }
    save_file(tensors | further, tmp_path / SINGLE_FILE_NAME, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((stored("deepseek_v3", layout) / "config.json").read_text())
    found = read(tmp_path)
    assert found is not None
    assert [layer.layer for layer in found.layers] == [1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": None},
        {"num_local_experts": 3},
        {"num_local_experts": 5},
        {"num_local_experts": None},
        {"intermediate_size": 24},
        {"hidden_size": 16},
        {"num_hidden_layers": 3},
        {"model_type": "jamba"},
    ],
)
def test_settings_that_do_not_fit_are_left_to_transformers(directory: Path, settings: dict[str, object]) -> None:
    assert read(directory) is not None
    change_config(directory, **settings)
    assert read(directory) is None


@pytest.mark.parametrize("value", [None, torch.zeros(48, 31), torch.zeros(48, 32, dtype=torch.int8)])
def test_tensors_that_do_not_fit_are_left_to_transformers(directory: Path, value: torch.Tensor | None) -> None:
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]
        if value is not None:
            tensors[key] = value

    change_tensors(directory, change)
    assert read(directory) is None


def test_another_activation_is_computed(directory: Path) -> None:
    """An expert left to transformers still comes from the same source, and computes another function."""
    x_nD = torch.ones(1, 32)
    silu = ExpertSource(directory).load(EXPERT)(x_nD)
    change_config(directory, hidden_act="gelu")
    assert (ExpertSource(directory).load(EXPERT)(x_nD) - silu).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"expert_kind": "cube"}, 'got "cube", no such kind'),
        ({"hidden_act": "cube"}, 'got "cube", no such activation'),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', no int"),
        ({"moe_layers": []}, "no layer with experts"),
    ],
)
def test_settings_of_our_own_family_that_make_no_expert(
    tmp_path: Path, settings: dict[str, object], complaint: str
) -> None:
    save(make_model("moecluster"), tmp_path, "fused")
    change_config(tmp_path, **settings)
    with pytest.raises(UnsupportedModelError, match=complaint):
        ExpertSource(tmp_path)


def test_an_expert_of_our_own_family_has_the_shape_that_its_settings_say(tmp_path: Path) -> None:
    save(make_model("moecluster"), tmp_path, "fused")
    change_config(tmp_path, moe_intermediate_size=16)
    with pytest.raises(CheckpointError, match=r"proj\.weight of expert 1/3 in .* has shape \[48, 32\], .* \[32, 32\]"):
        ExpertSource(tmp_path).load(EXPERT)


def test_a_file_that_shrinks_after_it_was_opened(directory: Path) -> None:
    source = ExpertSource(directory)
    file = directory / SINGLE_FILE_NAME
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since it was opened"):
        source.load(EXPERT)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read: .*No such file"):
        source.load(EXPERT)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "moecluster"])
def test_an_expert_actor_does_without_transformers(stored: Callable[[str, Layout], Path], family: str) -> None:
    """Nor does it import its dependencies: imports dominate an actor's memory and start-up time."""
    program = """
import sys
import actors.expert_actor
from moecluster.expert.service import ExpertService
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import ExpertId
service = ExpertService(is_given=lambda path: True, name="expert-0")
assert service.load(LoadRequest(term=1, experts=(ExpertId(layer=1, index=0),), checkpoint=sys.argv[1])) > 0
heavy = {"transformers", "scipy", "sympy", "matplotlib", "torch._dynamo", "torch.distributed.tensor"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program, str(stored(family, "per-expert"))], check=True)


def test_controllers_and_drivers_do_without_transformers() -> None:
    program = """
import sys
import actors.controller_actor, actors.driver
heavy = {"transformers", "sympy", "matplotlib", "torch._dynamo", "torch.distributed.tensor"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)

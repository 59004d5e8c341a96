"""FP8 and MXFP4 checkpoints: dequantized expert by expert as in transformers, with the same logits."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.files import LocalFiles, Seen
from moecluster.models.checkpoint.reader import SINGLE_FILE_NAME, Checkpoint
from moecluster.models.experts.source import ExpertSource
from moecluster.models.experts.swiglu import SwigluExperts
from moecluster.types import ExpertId
from tests.support.models.families import make_model, save
from tests.support.models.parity import LOGIT_TOLERANCE, LocalExperts, batch_for, largest_difference, load_routed

BLOCK = (16, 16)
FP8_MAX = 448.0

Stored = tuple[Path, dict[str, torch.Tensor]]  # a directory, and its tensors as dequantized by transformers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantizes like DeepSeek: a scale per block, edge blocks smaller. "" and "_scale_inv" -> tensor."""
    rows, columns = weight.shape
    grid = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    padded = torch.zeros(grid[0] * BLOCK[0], grid[1] * BLOCK[1])
    padded[:rows, :columns] = weight
    blocks = padded.view(grid[0], BLOCK[0], grid[1], BLOCK[1])
    scale = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    values = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
    return {"": values.to(torch.float8_e4m3fn), "_scale_inv": scale}


def is_quantized_fp8(key: str, value: torch.Tensor) -> bool:
    """DeepSeek does not quantize embeddings, norms, gates and the head."""
    return (value.ndim == 2 and key.endswith("_proj.weight")) or "_proj_with_mqa.weight" in key


def write(directory: Path, tensors: Mapping[str, torch.Tensor], quantization: Mapping[str, object]) -> Path:
    save_file(dict(tensors), directory / SINGLE_FILE_NAME, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return directory


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3_moe"])
def fp8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("fp8")
    save(make_model(request.param), directory, "per-expert")
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for key, value in load_file(directory / SINGLE_FILE_NAME).items():
        if not is_quantized_fp8(key, value):
            stored[key] = plain[key] = value
            continue
        parts = quantize_fp8(value)
        stored |= {f"{key}{suffix}": part.contiguous() for suffix, part in parts.items()}
        plain[key] = _dequantize_fp8_weight(parts[""], parts["_scale_inv"], list(BLOCK), torch.float32)
        assert 0 < largest_difference(plain[key], value) < 0.1
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    return write(directory, stored, settings), plain


def mxfp4(weight_EIO: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random 4-bit floats about as large as the weight, in gpt-oss' format."""
    experts, inner, outer = weight_EIO.shape
    blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (experts, outer, inner // 32), generator=generator, dtype=torch.uint8)
    return {"_blocks": blocks, "_scales": scales}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The same for gpt-oss, where only experts are quantized."""
    directory = tmp_path_factory.mktemp("mxfp4")
    model = make_model("gpt_oss", intermediate_size=64)
    save(model, directory, "per-expert")
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for key, value in load_file(directory / SINGLE_FILE_NAME).items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = plain[key] = value
            continue
        parts = mxfp4(value, generator)
        stored |= {f"{key}{suffix}": part for suffix, part in parts.items()}
        plain[key] = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"], dtype=torch.float32)
        assert plain[key].shape == value.shape
    return write(directory, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}), plain


def reference_model(directory: Path, plain: Mapping[str, torch.Tensor], tmp_path: Path) -> PreTrainedModel:
    """transformers' own model with the dequantized tensors."""
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(dict(plain), tmp_path / SINGLE_FILE_NAME, metadata={"format": "pt"})
    family = type(make_model(config["model_type"]))
    model: PreTrainedModel = family.from_pretrained(tmp_path, experts_implementation="eager")
    model.eval()
    return model


def all_experts(source: ExpertSource) -> list[ExpertId]:
    return [ExpertId(layer=layer.layer, index=index) for layer in source.layers for index in range(layer.num_experts)]


def assert_same_logits(directory: Path, reference: PreTrainedModel) -> None:
    routed = load_routed(directory, LocalExperts(directory))
    with torch.no_grad():
        assert largest_difference(routed(batch_for()).logits, reference(batch_for()).logits) <= LOGIT_TOLERANCE


def expert_rows(model: PreTrainedModel, source: ExpertSource, expert: ExpertId) -> dict[str, torch.Tensor]:
    name = next(layer.name for layer in source.layers if layer.layer == expert.layer)
    experts: nn.Module = model.get_submodule(name)
    return {name: value.detach()[expert.index] for name, value in experts.named_parameters(recurse=False)}


def test_fp8_experts_and_trunk_are_as_transformers_dequantises_them(fp8: Stored, tmp_path: Path) -> None:
    directory, plain = fp8
    source = ExpertSource(directory)
    assert isinstance(source._reader, SwigluExperts)  # no transformers in an expert actor
    reference = reference_model(directory, plain, tmp_path)
    for expert in all_experts(source):
        expected = expert_rows(reference, source, expert)
        for dtype in DTYPES:
            ours = dict(source.load(expert, dtype).named_parameters())
            assert ours.keys() == expected.keys()
            assert all(torch.equal(ours[name], value.to(dtype)) for name, value in expected.items())
    assert_same_logits(directory, reference)


def test_whole_blocks_are_as_the_loader_of_transformers_has_them(fp8: Stored) -> None:
    directory, _ = fp8
    stored, checkpoint = load_file(directory / SINGLE_FILE_NAME), Checkpoint.open(directory)
    compared = 0
    for key, scales in stored.items():
        weight = key.removesuffix("_scale_inv")
        if weight == key or any(size % part for size, part in zip(stored[weight].shape, BLOCK, strict=True)):
            continue
        for dtype in DTYPES:
            expected = Fp8Dequantize(None)._dequantize_one(stored[weight], scales, dtype)
            assert torch.equal(checkpoint.read(weight, dtype=dtype), expected)
        compared += 1
    assert compared >= 8


def test_mxfp4_experts_are_as_transformers_dequantises_them(gpt_oss: Stored, tmp_path: Path) -> None:
    directory, plain = gpt_oss
    source = ExpertSource(directory)
    reference = reference_model(directory, plain, tmp_path)
    for expert in all_experts(source):
        expected = expert_rows(reference, source, expert)
        for dtype in DTYPES:
            ours = dict(source.load(expert, dtype).named_parameters())
            assert ours.keys() == expected.keys()
            assert all(torch.equal(ours[name], value.to(dtype)) for name, value in expected.items())
    assert_same_logits(directory, reference)


def test_large_tensors_are_dequantised_in_pieces(tmp_path: Path) -> None:
    """Several chunks of rows, ragged blocks, rows of a fused tensor, power-of-two scales."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(3, 1500, 1000, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.randint(120, 130, (3, 12, 8), generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    blocks = torch.randint(0, 256, (2, 1100, 32, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(100, 140, (2, 1100, 32), generator=generator, dtype=torch.uint8)
    (tmp_path / "config.json").write_text("{}")
    fp8 = {"w": values, "w_scale_inv": scales}
    write(tmp_path, fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    expected = _dequantize_fp8_weight(values, scales.float(), [128, 128], torch.float32)
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read("w"), expected)
    assert torch.equal(checkpoint.read("w", 1, torch.bfloat16), expected[1:2].to(torch.bfloat16))
    write(tmp_path, {"w_blocks": blocks, "w_scales": exponents}, {"quant_method": "mxfp4"})
    expected = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read("w"), expected)
    assert torch.equal(checkpoint.read("w", 1, torch.bfloat16), expected[1:2].to(torch.bfloat16))


class Recorded(LocalFiles):
    """Counts the bytes read."""

    read_bytes = 0

    def read_into(self, name: str, begin: int, out: memoryview, seen: Seen | None = None) -> None:
        self.read_bytes += len(out)
        super().read_into(name, begin, out, seen)


def test_an_expert_costs_its_own_bytes(fp8: Stored, gpt_oss: Stored) -> None:
    for directory, _ in (fp8, gpt_oss):
        files = Recorded(directory)
        source = ExpertSource(Checkpoint.of(files))
        files.read_bytes = 0
        expert = all_experts(source)[-1]
        source.load(expert, torch.bfloat16)
        assert 0 < files.read_bytes == source.expert_bytes(expert)


@pytest.mark.parametrize("change", ["blocks", "dtype", "missing"])
def test_scales_that_do_not_fit_are_named(tmp_path: Path, change: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {"w": torch.zeros(32, 32).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(2, 2)}
    if change == "blocks":
        tensors["w_scale_inv"] = torch.ones(2, 3)
    elif change == "dtype":
        tensors["w_scale_inv"] = torch.ones(2, 2, dtype=torch.int8)
    else:
        del tensors["w_scale_inv"]
    write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": list(BLOCK)})
    with pytest.raises(CheckpointError, match=r"w_scale_inv in .* expected for a weight|without scales"):
        Checkpoint.open(tmp_path).read("w")
    write(tmp_path, {"w_blocks": torch.zeros(2, 4, 1, 15, dtype=torch.uint8)}, {"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match=r"blocks \[2, 4, 1, 15\], scales missing"):
        Checkpoint.open(tmp_path)

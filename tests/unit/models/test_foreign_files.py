"""Model files written by others, or incompletely copied: errors are one line that names the file."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3_5MoeConfig

from moecluster.cli.common.model_target import model_name, read_target
from moecluster.errors import CheckpointError, UnsupportedModelError, UserError
from moecluster.hf.interface import Backend
from moecluster.hf.modelling import load_without_experts
from moecluster.models.checkpoint.reader import CONFIG_NAME, INDEX_NAME, SINGLE_FILE_NAME, Checkpoint
from moecluster.models.config import read_model_config
from moecluster.models.experts.family import FamilyExperts
from moecluster.models.experts.layout import ExpertLayout, join_experts
from moecluster.models.experts.source import ExpertSource
from moecluster.models.experts.swiglu import swiglu_experts
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.models.tokenizer.load import load_tokenizer
from moecluster.models.trunk import checkpoint_state, load_trunk
from moecluster.models.update.compatibility import check_same_shape
from moecluster.models.usable import refuse_unusable
from moecluster.types import ExpertId
from tests.support.models.families import make_model
from tests.support.models.parity import no_experts

Spoil = Callable[[Path], object]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("foreign") / "model"
    make_model("phimoe").save_pretrained(directory)
    build_byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def of_another_version(file: Path) -> None:
    content = json.loads(file.read_text())
    content["model"]["type"] = "BPE2"
    file.write_text(json.dumps(content))


def remove(directory: Path, pattern: str) -> None:
    for file in directory.glob(pattern):
        file.unlink()


def only_sentencepiece(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    edit(directory / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


TOKENIZERS: dict[str, tuple[str, Spoil]] = {
    "another version": ("tokenizer.json", lambda d: of_another_version(d / "tokenizer.json")),
    "no JSON": ("tokenizer.json", lambda d: (d / "tokenizer.json").write_text("{")),
    "a list": ("tokenizer.json", lambda d: (d / "tokenizer.json").write_text("[]")),
    "an empty object": ("tokenizer.json", lambda d: (d / "tokenizer.json").write_text("{}")),
    "no text": ("tokenizer.json", lambda d: (d / "tokenizer.json").write_bytes(b"\xff\xfe\x00")),
    "zero bytes": ("tokenizer.json", lambda d: (d / "tokenizer.json").write_bytes(b"")),
    "a pointer": ("tokenizer.json", lambda d: (d / "tokenizer.json").write_bytes(POINTER)),
    "deep": ("tokenizer.json", lambda d: (d / "tokenizer.json").write_text("[" * 10**5)),
    "tokenizer.model alone": ("tokenizer.json", only_sentencepiece),
    "nothing": ("tokenizer.json", lambda d: remove(d, "tokenizer*")),
    "special tokens": ("tokenizer_config.json", lambda d: edit(d / "tokenizer_config.json", extra_special_tokens=3)),
    "end mark": ("tokenizer_config.json", lambda d: edit(d / "tokenizer_config.json", eos_token={"a": 1})),
    "settings no JSON": ("tokenizer_config.json", lambda d: (d / "tokenizer_config.json").write_text("}")),
    "settings a pointer": ("tokenizer_config.json", lambda d: (d / "tokenizer_config.json").write_bytes(POINTER)),
    "special tokens map": ("special_tokens_map.json", lambda d: (d / "special_tokens_map.json").write_text("3")),
    "template": ("chat_template.jinja", lambda d: (d / "chat_template.jinja").write_text("{% for %}")),
    "template in settings": (
        "tokenizer_config.json",
        lambda d: edit(d / "tokenizer_config.json", chat_template="{{ messages"),
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_is_named(directory: Path, case: str) -> None:
    file, spoil = TOKENIZERS[case]
    spoil(directory)
    with pytest.raises(CheckpointError, match=rf"{directory}.*{file}") as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)


MODELS: dict[str, tuple[str, Spoil]] = {
    "config no JSON": (CONFIG_NAME, lambda d: (d / CONFIG_NAME).write_text("{]")),
    "config a list": (CONFIG_NAME, lambda d: (d / CONFIG_NAME).write_text("[1]")),
    "config empty": (CONFIG_NAME, lambda d: (d / CONFIG_NAME).write_bytes(b"")),
    "config a pointer": (CONFIG_NAME, lambda d: (d / CONFIG_NAME).write_bytes(POINTER)),
    "config in Latin-1": (CONFIG_NAME, lambda d: (d / CONFIG_NAME).write_bytes('{"a": "ä"}'.encode("latin-1"))),
    "another family": (CONFIG_NAME, lambda d: edit(d / CONFIG_NAME, model_type="no_such_family")),
    "a family that is a list": (CONFIG_NAME, lambda d: edit(d / CONFIG_NAME, model_type=["phimoe"])),
    "width a text": (CONFIG_NAME, lambda d: edit(d / CONFIG_NAME, hidden_size="thirty-two")),
    "width nothing": ("phimoe", lambda d: edit(d / CONFIG_NAME, hidden_size=0)),
    "activation": ("phimoe", lambda d: edit(d / CONFIG_NAME, hidden_act="no_such")),
    "experts a text": (CONFIG_NAME, lambda d: edit(d / CONFIG_NAME, num_local_experts="four")),
    "rope": (CONFIG_NAME, lambda d: edit(d / CONFIG_NAME, rope_parameters="linear")),
    "quantization": ("quantized by", lambda d: edit(d / CONFIG_NAME, quantization_config=[1])),
    "weights a pointer": (SINGLE_FILE_NAME, lambda d: (d / SINGLE_FILE_NAME).write_bytes(POINTER)),
    "weights empty": (SINGLE_FILE_NAME, lambda d: (d / SINGLE_FILE_NAME).write_bytes(b"")),
    "generation no JSON": (
        "generation_config.json",
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": '),
    ),
    "generation a list": ("generation_config.json", lambda d: (d / "generation_config.json").write_text("[]")),
    "end mark a text": ("generation_config.json", lambda d: edit(d / "generation_config.json", eos_token_id="</s>")),
    "end mark nested": ("generation_config.json", lambda d: edit(d / "generation_config.json", eos_token_id=[[2]])),
    "temperature": ("generation_config.json", lambda d: edit(d / "generation_config.json", temperature="hot")),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_used_is_named_before_anything_starts(directory: Path, case: str) -> None:
    named, spoil = MODELS[case]
    spoil(directory)
    with pytest.raises(UserError, match=named) as caught:
        refuse_unusable(directory)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        load_trunk(directory, no_experts)


def test_a_whole_model_is_usable(directory: Path) -> None:
    refuse_unusable(directory)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal model whose language model is an MoE, as published by its family."""
    directory = tmp_path_factory.mktemp("seeing")
    text = {
        "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24, "layer_types": ["full_attention"] * 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    whole = AutoModelForImageTextToText.from_config(Qwen3_5MoeConfig(text_config=text, vision_config=vision))
    whole.save_pretrained(directory)
    return directory


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(3, 12)[None]).logits
    return logits


def test_the_language_model_of_one_that_also_sees_is_taken(seeing: Path) -> None:
    source = ExpertSource(seeing)
    assert [(layer.layer, layer.num_experts) for layer in source.layers] == [(0, 4), (1, 4)]
    ours = load_trunk(seeing, shard_backend(source))
    theirs = AutoModelForCausalLM.from_pretrained(seeing, dtype=torch.float32, experts_implementation="eager")
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=0, atol=5e-6)


def test_its_experts_are_read_without_transformers_as_with_it(seeing: Path) -> None:
    checkpoint = Checkpoint.open(seeing)
    ours, theirs = swiglu_experts(checkpoint), FamilyExperts(checkpoint)
    assert ours is not None
    assert ours.layers == theirs.layers
    expert = ExpertId(layer=1, index=3)
    expected = dict(theirs.load(expert, torch.float32).named_parameters())
    found = dict(ours.load(expert, torch.float32).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_it_is_written_as_is_a_language_model_and_takes_its_place(seeing: Path, tmp_path: Path) -> None:
    """Trunk and experts use the same kind of keys, those that transformers writes for the language model alone."""
    source = ExpertSource(seeing)
    trunk = load_trunk(seeing, shard_backend(source))
    layout = ExpertLayout(trunk.config)
    experts = [
        layout.checkpoint_state(expert, dict(source.load(expert).named_parameters()))
        for layer in source.layers
        for expert in layout.experts_of(layer.layer)
    ]
    state = checkpoint_state(trunk) | join_experts(experts)
    alone = AutoModelForCausalLM.from_config(trunk.config)
    alone.save_pretrained(tmp_path / "alone")
    assert state.keys() == Checkpoint.open(tmp_path / "alone").tensors.keys()
    trunk.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / SINGLE_FILE_NAME, metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    torch.testing.assert_close(logits_of(theirs), logits_of(trunk), rtol=0, atol=5e-6)
    check_same_shape(seeing, tmp_path)
    check_same_shape(tmp_path, seeing)
    edit(tmp_path / CONFIG_NAME, vocab_size=256)
    with pytest.raises(CheckpointError, match=r"of another model than .*: vocab_size is 256, not 128"):
        check_same_shape(seeing, tmp_path)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4", "the family computes its experts without transformers' experts interface"),
        ("dbrx", "the family computes its experts without transformers' experts interface"),
        ("glm4v_moe", "it is made of several models, and transformers' AutoModelForCausalLM takes no language model"),
        (
            "qwen3_vl_moe",
            "it is made of several models, and transformers' AutoModelForCausalLM takes no language model",
        ),
        ("mistral3", "it is made of several models, and transformers' AutoModelForCausalLM takes no language model"),
        ("mistral4", "transformers has no language model of this family"),
    ],
)
def test_what_transformers_opens_no_language_model_of_is_refused(tmp_path: Path, family: str, reason: str) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"a {family}(_text)? model cannot be attached: {reason}"):
        ExpertLayout(config)
    with pytest.raises(UnsupportedModelError, match=f"a {family}(_text)? model cannot be attached: {reason}"):
        load_without_experts(config, {}, tmp_path, torch.float32)


def shard_backend(source: ExpertSource) -> Backend:
    """A backend that computes each (token, expert) pair separately."""

    def run(layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        y_TD = torch.zeros_like(x_TD)
        for t, k in itertools.product(range(len(x_TD)), range(ids_TK.shape[1])):
            shard = source.load(ExpertId(layer=layer, index=int(ids_TK[t, k])))
            y_TD[t] += weights_TK[t, k] * shard(x_TD[t : t + 1])[0]
        return y_TD

    return run


def test_what_is_no_directory(directory: Path, tmp_path: Path) -> None:
    for path in (directory / CONFIG_NAME, tmp_path / "nowhere", Path("x" * 5000), Path("a\0b")):
        with pytest.raises(CheckpointError, match="no model directory at"):
            Checkpoint.open(path)
        with pytest.raises(CheckpointError, match="no tokenizer directory at"):
            load_tokenizer(path)
    for target in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="no such model directory"):
            read_target(target, ())
    shutil.move(directory / CONFIG_NAME, tmp_path / "kept")
    (directory / CONFIG_NAME).mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(directory)


def test_the_single_file_goes_before_an_index_that_was_left(directory: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    make_model("phimoe", seed=1).save_pretrained(old, max_shard_size="40KB")
    key = "model.embed_tokens.weight"
    mine = Checkpoint.open(directory).read(key)
    for file in old.glob("*.safetensors*"):
        shutil.copy(file, directory)
    assert torch.equal(Checkpoint.open(directory).read(key), mine)
    for file in directory.glob("model-0*"):
        file.unlink()
    assert torch.equal(Checkpoint.open(directory).read(key), mine)
    (directory / INDEX_NAME).write_text("torn")
    assert torch.equal(Checkpoint.open(directory).read(key), mine)
    refuse_unusable(directory)


def test_a_model_of_a_download_cache_has_its_models_name(original: Path, tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "hub" / "models--Org--Tiny-MoE-1.5" / "snapshots" / ("0123456789abcdef" * 2)
    shutil.copytree(original, snapshot)
    link = tmp_path / "my-model"
    link.symlink_to(snapshot)
    assert model_name(str(snapshot)) == model_name(f"{snapshot}/") == "Tiny-MoE-1.5"
    assert model_name(str(link)) == "my-model"
    assert model_name(str(original)) == "model"
    assert (model_name("demo"), model_name("settings/mixtral.v2.toml")) == ("demo", "mixtral.v2")
    monkeypatch.chdir(link)
    assert model_name(".") == "Tiny-MoE-1.5"  # for the current directory, all links are resolved
    with pytest.raises(CheckpointError, match=rf"has no config\.json: give .*{snapshot.name}"):
        Checkpoint.open(snapshot.parent.parent)
    snapshot.parent.parent.rename(tmp_path / "hub" / "models--tiny")
    assert model_name(str(tmp_path / "hub" / "models--tiny" / "snapshots" / snapshot.name)) == "tiny"

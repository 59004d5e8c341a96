"""Settings are read strictly, and every error names the key, the given value and the expected one."""

import dataclasses
from pathlib import Path

import pytest

from moecluster.config import Config, load_config, read_config
from moecluster.config.load import SECTIONS, parse_override, preset_names
from moecluster.config.sections import ModelConfig
from moecluster.errors import ConfigError


def complaint(tables: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(tables)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_valid_and_every_setting_is_documented() -> None:
    assert read_config({}) == Config()
    for cls in SECTIONS.values():
        for declared in dataclasses.fields(cls):
            assert declared.metadata["doc"], f"{cls.section}.{declared.name} lacks its documentation"


def test_sections_are_the_fields_of_config() -> None:
    assert list(SECTIONS) == [declared.name for declared in dataclasses.fields(Config)]


def test_values_arrive_as_declared() -> None:
    config = read_config({"train": {"lr": 1, "betas": [0.8, 0.9]}, "model": {"gate_options": {"router_z": 3}}})
    assert config.train.lr == 1.0 and isinstance(config.train.lr, float)
    assert config.train.betas == (0.8, 0.9)
    assert config.model.gate_options == {"router_z": 3}


@pytest.mark.parametrize(
    ("tables", "parts"),
    [
        ({"trian": {}}, ["[trian]", "did you mean train?"]),
        ({"train": 3}, ["train: got 3", "section [train]"]),
        ({"train": {"step": 3}}, ["train.step: unknown key", "did you mean steps"]),
        ({"train": {"zzz": 3}}, ["train.zzz: unknown key", "known: data, tokenizer"]),
        ({"train": {"steps": "ten"}}, ["train.steps", 'got "ten"', "an integer"]),
        ({"train": {"steps": 1.5}}, ["train.steps", "got 1.5", "an integer"]),
        ({"train": {"steps": True}}, ["train.steps", "got true", "an integer"]),
        ({"train": {"steps": 0}}, ["train.steps", "got 0", "at least 1"]),
        ({"train": {"lr": 0}}, ["train.lr", "more than 0"]),
        ({"train": {"lr": float("nan")}}, ["train.lr", "a finite number"]),
        ({"train": {"min_lr_ratio": 2}}, ["train.min_lr_ratio", "at least 0 and at most 1"]),
        ({"train": {"betas": [0.9]}}, ["train.betas", "a list of 2 items, each a number"]),
        ({"train": {"betas": [0.9, 1.0]}}, ["train.betas[1]", "less than 1"]),
        ({"train": {"betas": [0.9, "x"]}}, ["train.betas[1]", "a number"]),
        ({"train": {"resume": 1}}, ["train.resume", "true or false"]),
        ({"train": {"durability": "chekpoint"}}, ["train.durability", "checkpoint, none"]),
        ({"train": {"batch_size": 8, "micro_batches": 3}}, ["train.micro_batches", "divisor of batch_size = 8"]),
        ({"train": {"sequence_length": 2048}}, ["train.sequence_length", "model.max_positions = 1024"]),
        ({"model": {"gate_options": 3}}, ["model.gate_options", "a table"]),
        ({"model": {"top_k": 9}}, ["model.top_k", "num_experts = 8"]),
        ({"model": {"hidden_size": 130}}, ["model.hidden_size", "multiple of 2 * num_heads = 8"]),
        ({"model": {"num_kv_heads": 3}}, ["model.num_kv_heads", "divisor of num_heads = 4"]),
        ({"model": {"first_dense_layers": 4}}, ["model.moe_every", "no layer is MoE"]),
        ({"model": {"dtype": "float8"}}, ["model.dtype", "float32, bfloat16"]),
        ({"serve": {"min_routers": 3, "max_routers": 2}}, ["serve.max_routers", "at least min_routers = 3"]),
        ({"controller": {"placement": "random"}}, ["controller.placement", "contiguous"]),
        ({"controller": {"placement": 3}}, ["controller.placement", "a string or a table"]),
        ({"controller": {"placement": {"expert-0": "0/1"}}}, ["controller.placement.expert-0", "a list, each"]),
    ],
)
def test_complaints_name_the_key_and_what_would_be_right(tables: dict[str, object], parts: list[str]) -> None:
    message = complaint(tables)
    for part in parts:
        assert part in message, message


def test_placement_may_be_a_table() -> None:
    config = read_config({"controller": {"placement": {"expert-0": ["*/0"], "expert-1": ["0/1", "1/1"]}}})
    assert config.controller.placement == {"expert-0": ("*/0",), "expert-1": ("0/1", "1/1")}


def test_ranges_hold_for_records_made_in_code_too() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_experts: got 0, expected at least 1"):
        ModelConfig(num_experts=0)


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


def test_moe_layers() -> None:
    model = ModelConfig(num_layers=6, moe_every=2, first_dense_layers=2)
    assert [model.is_moe_layer(layer) for layer in range(6)] == [False, False, False, True, False, True]


def test_file_with_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nsteps = 7\nlr = 0.5\n[model]\ngate_options = { a = 1 }\n")
    config = load_config(
        str(file), {"train.steps": 9, "train.seed": None, "model.gate_options.b": 2, "cluster.name": "x"}
    )
    assert (config.train.steps, config.train.lr, config.train.seed) == (9, 0.5, 0)
    assert config.model.gate_options == {"a": 1, "b": 2}
    assert config.cluster.name == "x"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"steps": 3}, "expected section.key"),
        ({"train.stepz": 3}, "did you mean steps"),
        ({"train.steps.x": 3}, "steps is not a table"),
        ({"a.b.c.d": 3}, "expected section.key"),
    ],
)
def test_wrong_overrides(tmp_path: Path, overrides: dict[str, object], part: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nsteps = 7\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), overrides)
    assert part in str(caught.value)


def test_override_text() -> None:
    assert parse_override("train.steps=100") == ("train.steps", 100)
    assert parse_override("train.betas=[0.9, 0.99]") == ("train.betas", [0.9, 0.99])
    assert parse_override("train.data=/some/file.txt") == ("train.data", "/some/file.txt")
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_override("train.steps")


def test_missing_or_broken_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or preset; did you mean demo") as caught:
        load_config("demoo")
    assert all(name in str(caught.value) for name in preset_names())
    (tmp_path / "torn.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match=r"torn\.toml: not valid TOML: .*line 1"):
        load_config(str(tmp_path / "torn.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(str(tmp_path / "binary.toml"))
    (tmp_path / "wrong.toml").write_text("[train]\nsteps = 0\n")
    with pytest.raises(ConfigError, match=r"wrong\.toml: train\.steps"):
        load_config(str(tmp_path / "wrong.toml"))


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_come_back_from_tables(name: str) -> None:
    config = load_config(name)
    assert read_config(config.to_tables()) == config

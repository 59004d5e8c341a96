"""Checkpoints composed of two: every reader finds the right weights, in every layout."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.reader import INDEX_NAME, Checkpoint
from moecluster.models.experts.source import ExpertSource
from moecluster.models.native.build import register_native_family
from moecluster.models.trunk import load_trunk
from moecluster.models.update import compose as composed_checkpoint
from moecluster.models.update.compose import compose
from moecluster.types import ExpertId
from tests.support.models.families import LAYOUTS, make_model, save
from tests.support.models.parity import no_experts

TAKEN = (ExpertId(layer=0, index=2), ExpertId(layer=1, index=0), ExpertId(layer=1, index=3))
Stored = Callable[..., Path]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The directory of a family's tiny model, written once."""
    root = tmp_path_factory.mktemp("models")

    def directory(family: str, layout: Any, seed: int, shard_size: str = "") -> Path:
        found = root / f"{family}-{layout}-{seed}-{shard_size}"
        if not found.is_dir():
            model = make_model(family, seed)
            if shard_size:
                model.save_pretrained(found, max_shard_size=shard_size, save_original_format=layout == "per-expert")
            else:
                save(model, found, layout)
            (found / "tokenizer.json").write_text(f'{{"of": {seed}}}')
        return found

    return directory


def same_experts(one: ExpertSource, other: ExpertSource, expert: ExpertId) -> bool:
    ours, theirs = one.load(expert).state_dict(), other.load(expert).state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("keep_trunk", [True, False])
@pytest.mark.parametrize(
    ("family", "layout", "shard_size"),
    [
        *((family, layout, "") for family in ("mixtral", "deepseek_v3") for layout in LAYOUTS),
        ("gpt_oss", "fused", ""),
        ("mixtral", "per-expert", "40KB"),
        ("mixtral", "fused", "40KB"),
        ("moecluster", "per-expert", ""),
    ],
)
def test_experts_and_trunk_come_from_where_they_are_wanted(stored, tmp_path, family, layout, shard_size, keep_trunk):
    served, update = (stored(family, layout, seed, shard_size) for seed in (0, 1))
    out = tmp_path / "out"
    old, new = ExpertSource(served), ExpertSource(update)
    known = [ExpertId(layer=layer.layer, index=i) for layer in old.layers for i in range(layer.num_experts)]
    taken = {expert for expert in (*TAKEN, ExpertId(layer=2, index=5)) if expert in known}
    compose(served, update, out, experts=taken, keep_trunk=keep_trunk)
    composed = ExpertSource(out)
    for expert in known:
        assert same_experts(composed, new if expert in taken else old, expert), expert
    trunk = load_trunk(out, no_experts).state_dict()
    wanted = load_trunk(served if keep_trunk else update, no_experts).state_dict()
    assert trunk.keys() == wanted.keys() and all(torch.equal(trunk[name], wanted[name]) for name in wanted)
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": 0 if keep_trunk else 1}
    # Any other reader sees the same: each tensor is in one file only.
    register_native_family()
    model = AutoModelForCausalLM.from_pretrained(out).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(served if keep_trunk else update).state_dict()
    assert all(torch.equal(model[name], theirs[name]) for name in theirs if ".experts." not in name)
    stored_keys = [key for file in out.glob("*.safetensors") for key in load_file(file)]
    assert sorted(stored_keys) == sorted(json.loads((out / INDEX_NAME).read_text())["weight_map"])


def test_all_experts_may_be_taken_and_the_trunk_kept(stored, tmp_path) -> None:
    served, update = (stored("mixtral", "per-expert", seed, "40KB") for seed in (0, 1))
    every = [ExpertId(layer=layer, index=index) for layer in (0, 1) for index in range(4)]
    compose(served, update, tmp_path / "out", experts=every, keep_trunk=True)
    composed, new, old = (Checkpoint.open(path) for path in (tmp_path / "out", update, served))
    for key in composed.tensors:
        assert torch.equal(composed.read(key), (new if ".experts." in key else old).read(key))


def test_whole_shards_are_linked_and_only_the_others_written(stored, tmp_path) -> None:
    served, update = (stored("mixtral", "per-expert", seed, "40KB") for seed in (0, 1))
    out = tmp_path / "out"
    compose(served, update, out, experts=TAKEN[:1], keep_trunk=True)
    inodes = {file.stat().st_ino for path in (served, update) for file in path.iterdir()}
    shards = list(out.glob("*.safetensors"))
    written = [file for file in shards if file.stat().st_ino not in inodes]
    assert 0 < len(written) <= 3 < len(shards)


def test_across_file_systems_links_are_symbolic(stored, tmp_path, monkeypatch) -> None:
    served, update = (stored("mixtral", "per-expert", seed, "40KB") for seed in (0, 1))

    def other_device(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    compose(served, update, tmp_path / "out", experts=TAKEN, keep_trunk=False)
    assert any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert same_experts(ExpertSource(tmp_path / "out"), ExpertSource(update), TAKEN[0])


def test_a_composed_checkpoint_can_be_composed_again(stored, tmp_path) -> None:
    first, second, third = (stored("mixtral", "per-expert", seed, "40KB") for seed in (0, 1, 2))
    compose(first, second, tmp_path / "a", experts=TAKEN[:1], keep_trunk=True)
    compose(tmp_path / "a", third, tmp_path / "b", experts=TAKEN[1:2], keep_trunk=True)
    composed = ExpertSource(tmp_path / "b")
    for expert, source in zip(TAKEN, (second, third, first), strict=True):
        assert same_experts(composed, ExpertSource(source), expert)


def test_shards_that_are_written_are_of_bounded_size(stored, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(composed_checkpoint, "MAX_SHARD_BYTES", 50_000)
    served, update = (stored("mixtral", "per-expert", seed) for seed in (0, 1))
    compose(served, update, tmp_path / "out", experts=TAKEN, keep_trunk=True)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 60_000


def test_what_cannot_be_put_together_is_refused_in_one_line_and_leaves_nothing(stored, tmp_path, monkeypatch) -> None:
    served, update = (stored("mixtral", "per-expert", seed) for seed in (0, 1))
    out = tmp_path / "out"
    half = tmp_path / "half"
    make_model("mixtral", 1).bfloat16().save_pretrained(half)
    (tmp_path / "taken").mkdir()
    for other, into, complaint in (
        (stored("mixtral", "fused", 1), out, "both must be stored in the same form"),
        (half, out, "is F32 in .* and BF16 in"),
        (stored("qwen3_moe", "per-expert", 1), out, "is of another model than .*: model_type is qwen3_moe"),
        (update, tmp_path / "taken", "is there already"),
    ):
        with pytest.raises(CheckpointError, match=complaint) as refused:
            compose(served, other, into, experts=TAKEN, keep_trunk=False)
        assert "\n" not in str(refused.value)

    def full_disk(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full_disk)
    with pytest.raises(CheckpointError, match=r"out cannot be written: .*No space left"):
        compose(served, update, out, experts=TAKEN, keep_trunk=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "taken"]

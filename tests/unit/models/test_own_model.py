"""The native model family: building whole or in parts, saving, loading, generating, attaching; every preset trains."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moecluster.config import load_config
from moecluster.config.load import preset_names
from moecluster.config.sections import ModelConfig
from moecluster.errors import ConfigError
from moecluster.hf.interface import attach
from moecluster.models.native.build import build_expert, build_model, empty_native_model, register_native_family
from moecluster.models.native.modeling import NativeExperts, NativeForCausalLM
from moecluster.types import ExpertId

TINY = ModelConfig(
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    num_experts=4,
    expert_inner_size=24,
    dense_inner_size=40,
    max_positions=64,
)
VARIANTS = {
    "plain": TINY,
    "shared and dense": dataclasses.replace(TINY, num_shared_experts=2, first_dense_layers=1, activation="gelu"),
    "every other, tied": dataclasses.replace(TINY, moe_every=2, tie_embeddings=True, expert_kind="ffn"),
    "switch": dataclasses.replace(TINY, gate="switch", top_k=1),
    "bias": dataclasses.replace(TINY, gate="deepseek-v3", gate_options={"n_group": 2, "topk_group": 2}),
    "bfloat16": dataclasses.replace(TINY, dtype="bfloat16"),
}


def tokens(rows: int = 3, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def states_equal(a: NativeForCausalLM, b: NativeForCausalLM) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", preset_names())
def test_presets_train(name: str) -> None:
    config = load_config(name)
    model = build_model(config.model, seed=0)
    input_ids = tokens(2, 64)
    model.begin_micro_batch(seed=0, step=0, micro_batch=0)
    output = model(input_ids=input_ids, labels=input_ids)
    output.loss.backward()
    assert torch.isfinite(output.loss) and output.aux_loss > 0
    untouched = set()
    for layer, routing in model.last_routings.items():
        tokens_E = torch.bincount(routing.ids_TK.flatten(), minlength=config.model.num_experts)
        assert tokens_E[: config.model.num_experts].sum() > 0
        untouched |= {(layer, int(i)) for i in (tokens_E == 0).nonzero()}
        for index in range(config.model.num_experts):
            expert = model.get_submodule(f"model.layers.{layer}.mlp.experts.{index}")
            for key, parameter in expert.named_parameters():
                if (layer, index) in untouched:
                    assert parameter.grad is None
                else:
                    assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{layer}/{index} {key}"
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None or ".experts." in key, f"{key} has no gradient"


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_give_the_same_model(variant: str, tmp_path: Path) -> None:
    register_native_family()
    model = build_model(VARIANTS[variant], seed=3).eval()
    for gate in model.gates().values():
        gate.after_step(torch.arange(4))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert isinstance(loaded, NativeForCausalLM)
    assert states_equal(model, loaded)
    assert all(parameter.dtype == model.get_parameter(key).dtype for key, parameter in loaded.named_parameters())
    input_ids = tokens()
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, loaded(input_ids).logits)


def test_keys_of_experts() -> None:
    keys = build_model(TINY, seed=0).state_dict()
    assert "model.layers.2.mlp.experts.3.gate_up_proj.weight" in keys
    assert "model.layers.2.mlp.experts.3.down_proj.weight" in keys
    assert "model.layers.2.mlp.gate.weight" in keys


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_begin_like_the_whole(variant: str) -> None:
    config = VARIANTS[variant]
    torch.manual_seed(1)
    whole = build_model(config, seed=7)
    before = torch.get_rng_state()
    again, trunk = build_model(config, seed=7), build_model(config, seed=7, with_experts=False)
    assert torch.equal(before, torch.get_rng_state()), "building must leave the global generator alone"
    assert states_equal(whole, again)
    assert not states_equal(whole, build_model(config, seed=8))
    state = whole.state_dict()
    assert trunk.state_dict().keys() == {key for key in state if ".experts." not in key}
    assert all(torch.equal(value, state[key]) for key, value in trunk.state_dict().items())
    for layer in whole.gates():
        for index in range(config.num_experts):
            expert = build_expert(config, ExpertId(layer=layer, index=index), seed=7)
            for key, value in expert.state_dict().items():
                assert torch.equal(value, state[f"model.layers.{layer}.mlp.experts.{index}.{key}"])
                assert value.std() > 0.01


@pytest.mark.parametrize("variant", ["plain", "every other, tied", "bfloat16"])
def test_gates_stay_in_float32(variant: str) -> None:
    model = build_model(VARIANTS[variant], seed=0)
    assert {parameter.dtype for gate in model.gates().values() for parameter in gate.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == getattr(torch, VARIANTS[variant].dtype)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == VARIANTS[variant].tie_embeddings


@pytest.mark.parametrize("variant", ["plain", "shared and dense", "every other, tied", "switch", "bias"])
def test_generate_with_cache_equals_whole_forward_passes(variant: str) -> None:
    model = build_model(dataclasses.replace(VARIANTS[variant], initializer_range=0.2), seed=0).eval()
    prompt = tokens(2, 5)
    text = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            logits = model(expected, use_cache=False).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(text, expected)


def test_padding_changes_no_text_and_visits_no_expert() -> None:
    model = build_model(dataclasses.replace(TINY, initializer_range=0.2), seed=0).eval()
    short, long = tokens(1, 4), tokens(1, 9, seed=1)
    padded = torch.cat([torch.cat([torch.full((1, 5), 258), short], dim=1), long])
    mask = (padded != 258).long()
    alone = model.generate(short, max_new_tokens=8, do_sample=False, eos_token_id=None)
    both = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(both[0, 5:], alone[0])
    model(padded, attention_mask=mask)
    for routing in model.last_routings.values():
        assert (routing.ids_TK[:5] == TINY.num_experts).all() and (routing.ids_TK[5:] < TINY.num_experts).all()


@pytest.mark.parametrize("variant", ["plain", "switch", "bias"])
def test_loss_is_cross_entropy_plus_the_gates_losses(variant: str) -> None:
    model, input_ids = build_model(VARIANTS[variant], seed=0).eval(), tokens()
    output = model(input_ids=input_ids, labels=input_ids)
    cross_entropy = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, cross_entropy + output.aux_loss)
    routings = model.last_routings
    assert list(routings) == list(model.gates())
    pooled = next(iter(model.gates().values())).pooled_losses([routing.pool for routing in routings.values()])
    parts = [*pooled.values(), *(loss for routing in routings.values() for loss in routing.aux_losses.values())]
    torch.testing.assert_close(output.aux_loss.detach(), torch.stack(parts).sum())
    assert not any(part.requires_grad for part in parts)


def test_experts_add_weighted_outputs_and_skip_what_is_out_of_range() -> None:
    experts: Any = build_model(TINY, seed=0).get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, NativeExperts)
    x_TD = torch.randn(5, 32)
    ids_TK = torch.tensor([[0, 3], [1, 4], [4, 4], [2, 0], [3, 2]])
    weights_TK = torch.rand(5, 2)
    y_TD = experts(x_TD, ids_TK, weights_TK)
    for t in range(5):
        kept = [(int(i), weight) for i, weight in zip(ids_TK[t], weights_TK[t], strict=True) if i < 4]
        expected_D = sum((weight * experts[i](x_TD[t]) for i, weight in kept), start=torch.zeros(32))
        torch.testing.assert_close(y_TD[t], expected_D)


def test_attached_trunk_equals_the_whole_model() -> None:
    config = VARIANTS["shared and dense"]
    whole, trunk = build_model(config, seed=0).eval(), build_model(config, seed=0, with_experts=False).eval()
    calls = []

    def backend(layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        calls.append(layer)
        y_TD: torch.Tensor = whole.model.layers[layer].mlp.experts(x_TD, ids_TK, weights_TK)
        return y_TD

    layers = attach(trunk, backend)
    assert [(record.layer, record.num_experts, record.hidden_size) for record in layers] == [(1, 4, 32), (2, 4, 32)]
    input_ids = tokens()
    with torch.no_grad():
        assert torch.equal(trunk(input_ids).logits, whole(input_ids).logits)
    assert calls == [1, 2]
    assert whole.config._experts_implementation == "eager"


def test_noise_follows_the_micro_batch() -> None:
    model, input_ids = build_model(VARIANTS["switch"], seed=0), tokens(4, 32)

    def loss(step: int) -> float:
        model.begin_micro_batch(seed=0, step=step, micro_batch=0)
        return float(model(input_ids=input_ids, labels=input_ids).loss.detach())

    assert loss(0) == loss(0) != loss(1)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"gate": "mixtrel"}, "did you mean mixtral"),
        ({"gate_options": {"zeta": 1}}, "model.gate_options.zeta: unknown key"),
        ({"expert_kind": "conv"}, "model.expert_kind"),
        ({"activation": "tanh"}, "model.activation"),
        ({"gate": "switch"}, "model.top_k: got 2"),
    ],
)
def test_wrong_architectures_are_named(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        empty_native_model(dataclasses.replace(TINY, **changes))
    assert part in str(caught.value)

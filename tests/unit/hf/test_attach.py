"""Attaching: every experts module is found and numbered; a family that would ignore the backend is refused by name."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    JetMoeConfig,
    LlamaConfig,
    SwitchTransformersConfig,
)

from moecluster.errors import UnsupportedModelError
from moecluster.hf.interface import attach, find_experts, moe_layers, register_backend
from moecluster.hf.shard import ExpertShard
from tests.support.models.families import FAMILIES, make_model
from tests.support.models.parity import batch_for


class Recorder:
    """A backend that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, torch.Size, torch.Size]] = []

    def __call__(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        assert ids_TK.shape == weights_TK.shape
        assert not ids_TK.is_floating_point()
        self.calls.append((layer, x_TD.shape, ids_TK.shape))
        return torch.zeros_like(x_TD)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_moe_layer_asks_the_backend_once(family: str) -> None:
    model = make_model(family)
    recorder = Recorder()
    layers = attach(model, recorder)
    with torch.no_grad():
        model(batch_for())
    assert [call[0] for call in recorder.calls] == [layer.layer for layer in layers]
    for (_, rows, choices), layer in zip(recorder.calls, layers, strict=True):
        assert rows == (18, layer.hidden_size)
        assert choices == (18, 2)


def test_layers_carry_the_decoder_layers_own_numbers() -> None:
    layers = moe_layers(make_model("deepseek_v3"))
    assert [(layer.layer, layer.num_experts, layer.name) for layer in layers] == [
        (1, 8, "model.layers.1.mlp.experts"),
        (2, 8, "model.layers.2.mlp.experts"),
    ]


def test_two_decoders_in_one_model_are_numbered_through() -> None:
    pair = nn.ModuleDict({"thinker": make_model("mixtral"), "talker": make_model("mixtral")})
    assert [layer for layer, _, _ in find_experts(pair)] == [0, 1, 2, 3]


def test_a_backend_that_is_a_module_does_not_become_part_of_the_model() -> None:
    class ModuleBackend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(
            self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
        ) -> torch.Tensor:
            return x_TD * self.weight

    model = make_model("mixtral")
    before = set(model.state_dict())
    attach(model, ModuleBackend())
    assert set(model.state_dict()) == before


def test_registering_twice_changes_nothing_and_a_model_not_attached_says_so() -> None:
    register_backend()
    register_backend()
    model = make_model("mixtral")
    model.set_experts_implementation("moecluster")
    with pytest.raises(UnsupportedModelError, match="is not attached: load the model with"):
        model(batch_for())


def test_families_that_ignore_the_registry_are_named() -> None:
    switch = AutoModelForSeq2SeqLM.from_config(
        SwitchTransformersConfig(
            vocab_size=64, d_model=16, d_ff=16, d_kv=4, num_heads=2, num_layers=2, num_decoder_layers=2, num_experts=2
        )
    )
    with pytest.raises(UnsupportedModelError, match="a switch_transformers model cannot be attached: the family"):
        attach(switch, Recorder())
    jetmoe = AutoModelForCausalLM.from_config(
        JetMoeConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=16,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    )
    with pytest.raises(UnsupportedModelError, match="a jetmoe model cannot be attached: the family"):
        attach(jetmoe, Recorder())


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="a llama model cannot be attached: it has no Mixture-of-Experts"):
        attach(AutoModelForCausalLM.from_config(config), Recorder())


def test_a_shard_is_a_copy_and_takes_an_empty_batch() -> None:
    experts = make_model("gpt_oss").get_submodule("model.layers.0.mlp.experts")
    shard = ExpertShard.of_module(experts, 1)
    assert shard(torch.empty(0, 32)).shape == (0, 32)
    assert list(shard.state_dict()) == ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"]
    with torch.no_grad():
        shard.get_parameter("down_proj").zero_()
    assert experts.get_parameter("down_proj")[1].abs().max() > 0

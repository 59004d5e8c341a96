"""Parameter counts from configurations alone, against the figures published by the models' authors."""

import json
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    SwitchTransformersConfig,
)

from moecluster.errors import CheckpointError, UnsupportedModelError
from moecluster.models.description import count_parameters, describe
from tests.support.models.families import FAMILIES, make_config, make_model

BILLION = 10**9

MIXTRAL_8X7B = MixtralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_local_experts=8,
    num_experts_per_tok=2,
)
QWEN3_30B_A3B = AutoConfig.for_model(
    "qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    num_experts=128,
    num_experts_per_tok=8,
    head_dim=128,
)
DEEPSEEK_V3 = DeepseekV3Config(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    num_key_value_heads=128,
    n_shared_experts=1,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
SWITCH_C = SwitchTransformersConfig(
    vocab_size=32128,
    d_model=2080,
    d_ff=6144,
    d_kv=64,
    num_heads=64,
    num_layers=15,
    num_decoder_layers=15,
    num_sparse_encoder_layers=15,
    num_sparse_decoder_layers=15,
    num_experts=2048,
)


@pytest.mark.parametrize(
    ("config", "total_billion", "active_billion"),
    [(MIXTRAL_8X7B, 46.7, 12.9), (QWEN3_30B_A3B, 30.5, 3.3)],
    ids=["mixtral-8x7b", "qwen3-30b-a3b"],
)
def test_published_figures_to_the_digit(config: PreTrainedConfig, total_billion: float, active_billion: float) -> None:
    described = describe(config)
    assert round(described.total_parameters / BILLION, 1) == total_billion
    assert described.active_parameters / BILLION == pytest.approx(active_billion, abs=0.06)


def test_deepseek_v3() -> None:
    described = describe(DEEPSEEK_V3)
    assert round(described.total_parameters / BILLION) == 671
    # The authors' 37 B leave out the input embedding (0.93 B), which one token meets in one row only.
    assert round((described.active_parameters - 129280 * 7168) / BILLION) == 37
    assert (described.num_layers, described.num_moe_layers) == (61, 58)
    assert (described.num_experts, described.top_k, described.hidden_size) == (256, 8, 7168)
    assert described.expert_parameters == 3 * 7168 * 2048


def test_switch_c_which_cannot_be_attached_is_still_counted() -> None:
    described = describe(SWITCH_C)
    assert round(described.total_parameters / 10**12, 1) == 1.6
    assert described.num_moe_layers == 30
    assert described.top_k == 1
    assert described.expert_parameters == 2 * 2080 * 6144


def test_counting_by_difference_equals_counting() -> None:
    small = SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_ff=32, d_kv=4, num_heads=2, num_layers=4, num_experts=5
    )
    whole = AutoModelForSeq2SeqLM.from_config(small)
    assert describe(small).total_parameters == sum(parameter.numel() for parameter in whole.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_counts_as_its_model_in_memory(family: str) -> None:
    model = make_model(family)
    described = describe(make_config(family))
    assert described.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert described.total_parameters == count_parameters(model).total
    assert described.top_k == 2
    assert described.num_experts in (4, 8)
    idle = described.num_moe_layers * (described.num_experts - 2) * described.expert_parameters
    assert described.active_parameters == described.total_parameters - idle


def test_a_directory_with_only_a_config_is_enough(tmp_path: Path) -> None:
    make_config("mixtral").save_pretrained(tmp_path)
    assert describe(tmp_path) == describe(make_config("mixtral"))


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match=r"llama.*no Mixture of Experts"):
        describe(config)


@pytest.mark.parametrize(
    ("text", "error", "names"),
    [
        ("", CheckpointError, "it is empty"),
        ("null", CheckpointError, "it is no JSON object"),
        (
            '{"model_type": "mixtral", "hidden_size": "wide"}',
            UnsupportedModelError,
            "'hidden_size' expected int, got str",
        ),
        ('{"model_type": "mixtral", "num_attention_heads": 0}', UnsupportedModelError, "no mixtral model can be built"),
        ('{"model_type": "mixtral", "hidden_act": "loud"}', UnsupportedModelError, "unknown 'loud'"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}', UnsupportedModelError, "contains custom code"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(tmp_path: Path, text: str, error: type[Exception], names: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=names) as caught:
        describe(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_and_a_missing_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(UnsupportedModelError, match="no-such-family"):
        describe(tmp_path)

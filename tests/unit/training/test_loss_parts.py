"""Cross-entropy and each auxiliary loss are reported separately, for native gates and transformers' families."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moecluster.cli.commands.train import _figures
from moecluster.models.native.configuration import NativeConfig
from moecluster.models.native.modeling import NativeForCausalLM
from moecluster.training.events import StepDone
from moecluster.training.gradients import FOREIGN_AUX_LOSS, loss_parts

VOCABULARY = 32
IDS_BS = torch.arange(24).view(2, 12) % VOCABULARY


def cross_entropy(logits_BSV: torch.Tensor) -> float:
    flat = logits_BSV[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(flat, IDS_BS[:, 1:].flatten()).detach())


@pytest.mark.parametrize(
    ("gate", "options", "kinds"),
    [
        ("mixtral", {"router_aux_loss_coef": 0.5}, {"load_balance"}),
        ("mixtral", {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}, {"load_balance", "router_z"}),
        ("sparsely-gated", {"w_importance": 0.3, "w_load": 0.2}, {"importance", "load"}),
        ("deepseek-v3", {"sequence_aux_loss_coef": 0.1, "n_group": 2, "topk_group": 2}, {"sequence_balance"}),
    ],
)
def test_parts_of_our_own_models_add_up_to_the_loss(gate, options, kinds) -> None:
    torch.manual_seed(0)
    config = NativeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        gate=gate,
        gate_options=options,
        num_experts=4,
        num_experts_per_tok=2,
        moe_layers=(0, 1),
        moe_intermediate_size=8,
    )
    model = NativeForCausalLM(config)
    output = model(input_ids=IDS_BS, labels=IDS_BS, use_cache=False)
    loss, aux_losses = loss_parts(model, output)
    assert loss == pytest.approx(cross_entropy(output.logits), rel=1e-5)
    assert aux_losses.keys() == kinds and all(value > 0 for value in aux_losses.values())
    assert loss + sum(aux_losses.values()) == pytest.approx(float(output.loss.detach()), rel=1e-6)


@pytest.mark.parametrize("asked", [False, True])
def test_parts_of_a_transformers_family(asked) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        router_aux_loss_coef=0.5,
        output_router_logits=asked,
    )
    model = MixtralForCausalLM(config)
    output = model(input_ids=IDS_BS, labels=IDS_BS, use_cache=False)
    loss, aux_losses = loss_parts(model, output)
    assert loss == pytest.approx(cross_entropy(output.logits), rel=1e-5)
    assert aux_losses.keys() == ({FOREIGN_AUX_LOSS} if asked else set())
    assert loss + sum(aux_losses.values()) == pytest.approx(float(output.loss.detach()), rel=1e-6)


def test_the_bar_tells_them_apart() -> None:
    step = StepDone(
        step=1,
        loss=2.5,
        aux_losses={"router_z": 0.001, "load_balance": 0.02},
        learning_rate=1e-3,
        grad_norm=1.0,
        seconds=1.0,
        tokens_per_s=1234.0,
        balancedness=None,
        attempts=1,
    )
    assert _figures(step) == "cross-entropy 2.500  load_balance 0.0200  router_z 0.0010  1,234 tokens/s"
    assert step.total_loss == pytest.approx(2.521)

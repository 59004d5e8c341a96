"""Each gate against an independent form of its formula, and against transformers where it has that system."""

import pytest
import torch
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from moecluster.moe.gates.base import Gate
from moecluster.moe.gates.registry import make_gate
from tests.unit.moe.gate_helpers import HIDDEN, NUM_EXPERTS, gate_of, losses_of


def assert_same_routing(gate: Gate, x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> None:
    """Compares dense [T, E] weights: the order within a token is free."""
    routing = gate(x_TD)
    ours_TE = torch.zeros(len(x_TD), NUM_EXPERTS + 1).scatter(1, routing.ids_TK, routing.weights_TK.detach())
    theirs_TE = torch.zeros(len(x_TD), NUM_EXPERTS + 1).scatter(1, ids_TK, weights_TK.detach())
    torch.testing.assert_close(ours_TE, theirs_TE)


def test_mixtral_equals_transformers() -> None:
    gates, x_TD = [gate_of("mixtral", seed) for seed in range(3)], torch.randn(50, HIDDEN)
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=NUM_EXPERTS, num_experts_per_tok=2)
    router, logits = MixtralTopKRouter(config), []
    for gate in gates:
        router.weight = gate.weight
        layer_logits, weights_TK, ids_TK = router(x_TD)
        assert_same_routing(gate, x_TD, weights_TK, ids_TK)
        logits.append(layer_logits)
    pooled = gates[0].pooled_losses([gate(x_TD).pool for gate in gates])
    theirs = load_balancing_loss_func(tuple(logits), NUM_EXPERTS, top_k=2)
    torch.testing.assert_close(pooled, {"load_balance": 0.02 * theirs})


def test_mixtral_loss_per_layer() -> None:
    gate, x_TD = gate_of("mixtral", pool_layers=False), torch.randn(50, HIDDEN)
    routing = gate(x_TD)
    assert not routing.pool and gate.pooled_losses([routing.pool]) == {}
    theirs = load_balancing_loss_func((x_TD @ gate.weight.T,), NUM_EXPERTS, top_k=2)
    torch.testing.assert_close(routing.aux_losses["load_balance"], 0.02 * theirs)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_qwen3_moe_equals_transformers(norm_topk_prob: bool) -> None:
    gate, x_TD = gate_of("qwen3-moe", norm_topk_prob=norm_topk_prob), torch.randn(50, HIDDEN)
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=NUM_EXPERTS, num_experts_per_tok=2, norm_topk_prob=norm_topk_prob
    )
    router = Qwen3MoeTopKRouter(config)
    router.weight = gate.weight
    logits, weights_TK, ids_TK = router(x_TD)
    assert_same_routing(gate, x_TD, weights_TK, ids_TK)
    theirs = load_balancing_loss_func((logits,), NUM_EXPERTS, top_k=2)
    torch.testing.assert_close(losses_of(gate, gate(x_TD)), {"load_balance": 1e-3 * theirs})


def test_qwen3_moe_counts_load_over_the_micro_batches_of_a_step() -> None:
    gate, x_TD = gate_of("qwen3-moe", router_aux_loss_coef=1.0).train(), torch.randn(60, HIDDEN)

    def loss(rows_TD: torch.Tensor, micro_batch: int) -> torch.Tensor:
        gate.begin_micro_batch(seed=0, step=0, micro_batch=micro_batch, layer=0)
        gate(rows_TD)
        return losses_of(gate, gate(rows_TD))["load_balance"]  # computed twice, as with gradient checkpointing

    for _attempt in range(2):  # a repeated step resets its counts
        loss(x_TD[:20], 0)
        second = loss(x_TD[20:], 1)
        probs_TE = (x_TD @ gate.weight.T).softmax(-1)
        f_E = torch.bincount(probs_TE.topk(2).indices.flatten(), minlength=NUM_EXPERTS) / 60
        torch.testing.assert_close(second, NUM_EXPERTS * (f_E * probs_TE[20:].mean(0)).sum())
    gate.eval()
    torch.testing.assert_close(
        losses_of(gate, gate(x_TD[:20]))["load_balance"],
        load_balancing_loss_func((x_TD[:20] @ gate.weight.T,), NUM_EXPERTS, top_k=2),
    )


def test_switch_formula() -> None:
    gate, x_TD = gate_of("switch", jitter=0.0).train(), torch.randn(64, HIDDEN)
    routing = gate(x_TD)
    probs_TE = (x_TD @ gate.weight.T).softmax(-1)
    seen, expected_ids = [0] * NUM_EXPERTS, []
    for best in probs_TE.argmax(-1).tolist():
        seen[best] += 1
        expected_ids.append(best if seen[best] <= 10 else NUM_EXPERTS)  # 64 tokens / 8 experts * 1.25
    assert routing.ids_TK.flatten().tolist() == expected_ids
    kept_T = routing.ids_TK[:, 0] < NUM_EXPERTS
    assert 0 < kept_T.sum() < 64
    torch.testing.assert_close(routing.weights_TK[kept_T, 0], probs_TE.amax(-1)[kept_T])
    f_E = torch.tensor(seen) / 64
    loss = 0.01 * NUM_EXPERTS * (f_E * probs_TE.mean(0)).sum()
    torch.testing.assert_close(routing.aux_losses["load_balance"], loss)


def test_switch_equals_transformers() -> None:
    gate, x_TD = gate_of("switch", eval_capacity_factor=1.0).eval(), torch.randn(64, HIDDEN)
    config = SwitchTransformersConfig(d_model=HIDDEN, num_experts=NUM_EXPERTS, expert_capacity=8)
    router = SwitchTransformersTop1Router(config).eval()
    router.classifier.weight = gate.weight
    one_hot, probs, _ = router(x_TD[None])
    dropped_T = one_hot[0].sum(-1) == 0
    ids_T = one_hot[0].argmax(-1).masked_fill(dropped_T, NUM_EXPERTS)
    assert_same_routing(gate, x_TD, probs[0].masked_fill(dropped_T[:, None], 0.0), ids_T[:, None])


def test_switch_jitter_changes_only_what_the_gate_sees() -> None:
    gate = gate_of("switch", jitter=0.5).train()
    x_TD = torch.randn(64, HIDDEN)
    before = x_TD.clone()
    torch.manual_seed(1)
    probs_TE = gate(x_TD).weights_TK
    torch.manual_seed(1)
    factor_TD = 0.5 + torch.rand(64, HIDDEN)
    expected = ((x_TD * factor_TD) @ gate.weight.T).softmax(-1).amax(-1, keepdim=True)
    kept = probs_TE > 0
    torch.testing.assert_close(probs_TE[kept], expected[kept])
    assert torch.equal(x_TD, before)


@pytest.mark.parametrize("training", [True, False])
def test_sparsely_gated_formula(training: bool) -> None:
    gate, x_TD = gate_of("sparsely-gated").train(training), torch.randn(50, HIDDEN)
    torch.manual_seed(7)
    routing = gate(x_TD)
    torch.manual_seed(7)
    noise_weight = gate.get_parameter("noise_weight")
    clean_TE, std_TE = x_TD @ gate.weight.T, torch.nn.functional.softplus(x_TD @ noise_weight.T)
    h_TE = clean_TE + torch.randn(50, NUM_EXPERTS) * std_TE if training else clean_TE
    best = h_TE.topk(2).indices
    weights_TE = h_TE.masked_fill(torch.ones_like(h_TE).scatter(1, best, 0.0).bool(), float("-inf")).softmax(-1)
    assert torch.equal(routing.ids_TK, best)
    torch.testing.assert_close(routing.weights_TK, weights_TE.gather(1, best))
    importance_E = weights_TE.sum(0)
    loss = 0.1 * importance_E.var(unbiased=False) / importance_E.mean() ** 2
    torch.testing.assert_close(routing.aux_losses["importance"], loss)
    if not training:
        load_E = torch.bincount(best.flatten(), minlength=NUM_EXPERTS).float()
        torch.testing.assert_close(routing.aux_losses["load"], 0.1 * load_E.var(unbiased=False) / load_E.mean() ** 2)


def test_sparsely_gated_starts_at_zero_and_balanced() -> None:
    gate = make_gate("sparsely-gated", hidden_size=HIDDEN, num_experts=NUM_EXPERTS, top_k=4)
    torch.manual_seed(0)
    routing = gate(torch.randn(4000, HIDDEN))
    counts_E = torch.bincount(routing.ids_TK.flatten(), minlength=NUM_EXPERTS) / 2000
    assert counts_E.min() > 0.9 and counts_E.max() < 1.1


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (2, 2)])
def test_deepseek_v3_equals_transformers(n_group: int, topk_group: int) -> None:
    gate = gate_of("deepseek-v3", n_group=n_group, topk_group=topk_group).eval()
    gate.get_buffer("e_score_correction_bias").copy_(torch.randn(NUM_EXPERTS) / 4)
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    router.load_state_dict(gate.state_dict())
    x_TD = torch.randn(50, HIDDEN)
    _, weights_TK, ids_TK = router(x_TD)
    assert_same_routing(gate, x_TD, weights_TK, ids_TK)


def test_deepseek_v3_bias_moves_against_the_load_and_only_after_a_step() -> None:
    gate, x_TD = gate_of("deepseek-v3", bias_update_speed=0.25).train(), torch.randn(50, HIDDEN)
    gate(x_TD)
    bias_E = gate.get_buffer("e_score_correction_bias")
    assert (bias_E == 0).all()
    gate.after_step(torch.tensor([0, 2, 2, 2, 2, 2, 2, 4]))
    assert bias_E.tolist() == [0.25, 0, 0, 0, 0, 0, 0, -0.25]
    assert not bias_E.requires_grad


def test_deepseek_v3_bias_chooses_but_does_not_weigh() -> None:
    gate, x_TD = gate_of("deepseek-v3", n_group=1, topk_group=1, norm_topk_prob=False).eval(), torch.randn(9, HIDDEN)
    gate.get_buffer("e_score_correction_bias")[3] = 10.0
    routing = gate(x_TD)
    assert (routing.ids_TK[:, 0] == 3).all()
    torch.testing.assert_close(routing.weights_TK[:, 0], 2.5 * (x_TD @ gate.weight[3]).sigmoid())


def test_deepseek_v3_sequence_loss() -> None:
    gate, x_TD = gate_of("deepseek-v3", sequence_aux_loss_coef=1.0).train(), torch.randn(12, HIDDEN)
    sequence_ids_T = torch.tensor([0] * 5 + [1] * 7)
    scores_TE = (x_TD @ gate.weight.T).sigmoid()
    expected = []
    for rows_tE in (scores_TE[:5], scores_TE[5:]):
        f_E = (
            torch.bincount(rows_tE.topk(2).indices.flatten(), minlength=NUM_EXPERTS) * NUM_EXPERTS / (2 * len(rows_tE))
        )
        expected.append((f_E * (rows_tE / rows_tE.sum(-1, keepdim=True)).mean(0)).sum())
    loss = gate(x_TD, sequence_ids_T=sequence_ids_T).aux_losses["sequence_balance"]
    torch.testing.assert_close(loss, torch.stack(expected).mean())

"""Properties of every gate, whatever its kind."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecluster.errors import ConfigError
from moecluster.moe.gates.base import Routing
from moecluster.moe.gates.registry import GATES, make_gate
from tests.unit.moe.gate_helpers import HIDDEN, NUM_EXPERTS, gate_of, losses_of, same

NOISY = ("switch", "sparsely-gated")


@pytest.mark.parametrize("name", GATES)
@settings(max_examples=10, deadline=None)
@given(num_tokens=st.integers(0, 30), training=st.booleans(), seed=st.integers(0, 1000))
def test_routing_is_well_formed(name: str, num_tokens: int, training: bool, seed: int) -> None:
    gate = gate_of(name, seed).train(training)
    routing = gate(torch.randn(num_tokens, HIDDEN))
    shape = (num_tokens, gate.top_k)
    assert routing.ids_TK.shape == routing.weights_TK.shape == shape
    assert routing.ids_TK.dtype == torch.int64 and routing.weights_TK.dtype == torch.float32
    assert ((routing.ids_TK >= 0) & (routing.ids_TK <= NUM_EXPERTS)).all()
    assert (routing.weights_TK >= 0).all()
    assert (routing.weights_TK[routing.ids_TK == NUM_EXPERTS] == 0).all()
    for ids_K in routing.ids_TK.tolist():
        kept = [i for i in ids_K if i < NUM_EXPERTS]
        assert len(kept) == len(set(kept)), "an expert was chosen twice for one token"
    assert all(torch.isfinite(loss) for loss in losses_of(gate, routing).values())


@pytest.mark.parametrize("name", GATES)
def test_gradients_reach_every_parameter_through_weights_and_losses(name: str) -> None:
    gate = gate_of(name).train()
    routing = gate(torch.randn(40, HIDDEN))
    # The plain sum of weights that sum to a constant would have no gradient.
    task = (routing.weights_TK * torch.randn(routing.weights_TK.shape)).sum()
    for total in (task, sum(losses_of(gate, routing).values(), start=torch.zeros(()))):
        gate.zero_grad()
        total.backward(retain_graph=True)
        assert gate.weight.grad is not None and gate.weight.grad.abs().sum() > 0
    for parameter in gate.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 30.0, 60.0, 110.0, 1e3, 1e4])
def test_losses_and_gradients_are_finite_however_large_the_logits_are(name: str, scale: float) -> None:
    gate = gate_of(name, router_z_loss_coef=1e-3, router_entropy_coef=1e-3).train()
    for towards in (-1.0, 1.0, 0.0):  # all logits of a token negative, positive, and mixed
        x_TD = (torch.randn(40, HIDDEN) if not towards else torch.rand(40, HIDDEN)).requires_grad_()
        gate.zero_grad()
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(torch.rand(parameter.shape) * towards if towards else torch.randn(parameter.shape))
                parameter.mul_(scale / float((x_TD @ parameter.T).abs().max()))
        routing = gate(x_TD)
        losses = losses_of(gate, routing)
        (sum(losses.values(), start=torch.zeros(())) + routing.weights_TK.square().sum()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        for tensor in (x_TD, *gate.parameters()):
            assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("name", GATES)
def test_computes_in_float32_for_bfloat16_rows(name: str) -> None:
    gate, x_TD = gate_of(name).eval(), torch.randn(12, HIDDEN, dtype=torch.bfloat16)
    assert same(gate(x_TD), gate(x_TD.float()))


@pytest.mark.parametrize("name", GATES)
def test_padding_visits_no_expert_and_counts_nowhere(name: str) -> None:
    gate, x_TD = gate_of(name).eval(), torch.randn(12, HIDDEN)
    valid_T = torch.arange(12) % 3 != 0
    padded, alone = gate(x_TD, valid_T=valid_T), gate(x_TD[valid_T])
    assert (padded.ids_TK[~valid_T] == NUM_EXPERTS).all() and (padded.weights_TK[~valid_T] == 0).all()
    assert torch.equal(padded.ids_TK[valid_T], alone.ids_TK)
    assert torch.equal(padded.weights_TK[valid_T], alone.weights_TK)
    assert losses_of(gate, padded) == losses_of(gate, alone)


@pytest.mark.parametrize("name", GATES)
def test_gradient_through_padded_weights(name: str) -> None:
    gate, x_TD = gate_of(name).eval(), torch.randn(6, HIDDEN, requires_grad=True)
    gate(x_TD, valid_T=torch.arange(6) < 4).weights_TK[:, 0].sum().backward()
    assert x_TD.grad is not None and (x_TD.grad[4:] == 0).all()
    gate(x_TD, valid_T=torch.zeros(6, dtype=torch.bool))  # padding only


@pytest.mark.parametrize("name", GATES)
def test_state_dict_round_trip(name: str) -> None:
    gate, other, x_TD = gate_of(name).eval(), gate_of(name, seed=1).eval(), torch.randn(20, HIDDEN)
    gate.after_step(torch.arange(NUM_EXPERTS))
    other.load_state_dict(gate.state_dict())
    assert same(gate(x_TD), other(x_TD))
    assert same(gate(x_TD), copy.deepcopy(gate)(x_TD))


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_a_function_of_the_micro_batch(name: str) -> None:
    gate, x_TD = gate_of(name).train(), torch.randn(64, HIDDEN)

    def route(**changed: int) -> Routing:
        gate.begin_micro_batch(**{"seed": 1, "step": 2, "micro_batch": 3, "layer": 4, **changed})
        routing: Routing = gate(x_TD)
        return routing

    first = route()
    assert same(first, gate(x_TD)), "a forward call that is repeated must draw the same"
    assert same(first, route())
    for key in ("seed", "step", "micro_batch", "layer"):
        assert not same(first, route(**{key: 9})), key


@pytest.mark.parametrize("name", NOISY)
def test_noise_without_a_key_follows_the_global_generator_and_stops_outside_training(name: str) -> None:
    gate, x_TD = gate_of(name).train(), torch.randn(64, HIDDEN)
    torch.manual_seed(5)
    first, second = gate(x_TD), gate(x_TD)
    torch.manual_seed(5)
    assert same(first, gate(x_TD)) and not same(first, second)
    gate.eval()
    assert same(gate(x_TD), gate(x_TD))


def test_any_gate_takes_z_loss_entropy_and_capacity() -> None:
    gate = gate_of("mixtral", router_z_loss_coef=0.5, router_entropy_coef=0.25, capacity_factor=0.5).train()
    x_TD = torch.randn(32, HIDDEN)
    routing = gate(x_TD)
    logits_TE = x_TD @ gate.weight.T
    log_probs_TE = logits_TE.log_softmax(-1)
    torch.testing.assert_close(routing.aux_losses["router_z"], 0.5 * logits_TE.exp().sum(-1).log().square().mean())
    entropy = -(log_probs_TE.exp() * log_probs_TE).sum(-1).mean()
    torch.testing.assert_close(routing.aux_losses["router_entropy"], 0.25 * entropy)
    counts_E = torch.bincount(routing.ids_TK.flatten(), minlength=NUM_EXPERTS + 1)
    assert counts_E[:-1].max() == 4  # 32 tokens * 2 / 8 experts * 0.5
    assert counts_E[-1] >= 32


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("mixtrel", {}, ["model.gate", "did you mean mixtral?"]),
        ("zzz", {}, ["model.gate", "known: mixtral, qwen3-moe, switch, sparsely-gated, deepseek-v3"]),
        (
            "mixtral",
            {"router_aux_los_coef": 1.0},
            ["model.gate_options.router_aux_los_coef", "did you mean router_aux_loss_coef"],
        ),
        ("mixtral", {"router_aux_loss_coef": -1.0}, ["model.gate_options.router_aux_loss_coef", "at least 0"]),
        ("qwen3-moe", {"norm_topk_prob": 1}, ["model.gate_options.norm_topk_prob", "true or false"]),
        ("switch", {"drop_policy": "x"}, ["model.gate_options.drop_policy", "position, probability"]),
        ("switch", {}, ["model.top_k: got 2", "1 expert"]),
        ("deepseek-v3", {"n_group": 3}, ["model.gate_options.n_group: got 3", "groups of equal size"]),
        ("deepseek-v3", {"n_group": 8}, ["model.gate_options.n_group: got 8", "at least 2, of 8 experts"]),
        ("deepseek-v3", {"n_group": 2, "topk_group": 3}, ["model.gate_options.topk_group", "n_group = 2"]),
    ],
)
def test_wrong_gates_and_options(name: str, arguments: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_gate(name, hidden_size=HIDDEN, num_experts=NUM_EXPERTS, top_k=2, **arguments)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("top_k", [0, 9])
def test_top_k_out_of_range(top_k: int) -> None:
    with pytest.raises(ConfigError, match="top_k"):
        make_gate("mixtral", hidden_size=HIDDEN, num_experts=NUM_EXPERTS, top_k=top_k)


def test_noise_is_the_same_while_a_model_is_being_loaded() -> None:
    """Loading one sets torch's default dtype for the whole process, for a moment."""
    gate, shape = gate_of("sparsely-gated"), torch.Size((5, NUM_EXPERTS))
    gate.begin_micro_batch(seed=1, step=2, micro_batch=0, layer=0)
    before = [draw(shape, stream=1) for draw in (gate.uniform, gate.normal)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        meanwhile = [draw(shape, stream=1) for draw in (gate.uniform, gate.normal)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(noise.dtype is torch.float32 for noise in meanwhile)
    torch.testing.assert_close(meanwhile, before, rtol=0, atol=0)

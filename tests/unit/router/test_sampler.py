"""Sampling parameters, by the tokens drawn; a draw depends only on seed and position."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from moecluster.errors import InvalidMessage, RequestFailed
from moecluster.generation import SamplingParameters
from moecluster.proto import router_pb2
from moecluster.router.engine.sampler import SampledToken, draw, keyed_uniform, sample_tokens, with_penalties
from moecluster.rpc.router.messages import MAX_PENALTY, decode_generation_request


@dataclass
class Text:
    sampling: SamplingParameters
    name: str = "text"
    prompt_ids: tuple[int, ...] = (0,)
    generated_ids: tuple[int, ...] = ()
    wants_logprobs: bool = False
    top_logprobs: int = 0
    generated_counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.generated_counts = Counter(self.generated_ids)


def sampling(**changes: object) -> SamplingParameters:
    fields: dict[str, Any] = {"temperature": 1.0, **changes}
    return SamplingParameters(**fields)


def chosen(text: Text, logits_V: torch.Tensor) -> SampledToken:
    (token,) = sample_tokens([text], logits_V[None])
    assert isinstance(token, SampledToken), token
    return token


def draws(logits_V: torch.Tensor, count: int, **changes: object) -> torch.Tensor:
    """Relative frequency of each token over `count` positions."""
    found = [draw(logits_V, sampling(**changes), keyed_uniform(0, position)) for position in range(count)]
    return torch.bincount(torch.tensor(found), minlength=len(logits_V)) / count


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits_BV = torch.randn(2, 50)
    texts = [Text(sampling(seed=3), prompt_ids=(1,) * 7), Text(sampling(seed=3), prompt_ids=(2,) * 7)]
    alone = sample_tokens(texts[:1], logits_BV[:1])
    torch.manual_seed(123)
    assert sample_tokens(texts, logits_BV)[:1] == alone
    assert keyed_uniform(3, 7) != keyed_uniform(4, 7) != keyed_uniform(3, 8)


def test_a_request_that_goes_on_elsewhere_draws_what_it_would_have_drawn() -> None:
    logits_BV = torch.randn(1, 500)
    begun = Text(sampling(), prompt_ids=(1, 2), generated_ids=(3, 4, 5))
    assert sample_tokens([begun], logits_BV) == sample_tokens([Text(sampling(), prompt_ids=(1, 2, 3, 4, 5))], logits_BV)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature) -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected_V = torch.softmax(logits_V / temperature, dim=0)
    torch.testing.assert_close(draws(logits_V, 4000, temperature=temperature), expected_V, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("changes", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(top_k=5)),
        ({"top_p": 0.6}, TopPLogitsWarper(top_p=0.6)),
        ({"min_p": 0.2}, MinPLogitsWarper(min_p=0.2)),
    ],
)
def test_what_is_left_is_what_transformers_leaves(changes, warper) -> None:
    logits_V = torch.randn(40) * 2
    left_V = warper(torch.zeros(1, 1, dtype=torch.long), logits_V[None].clone())[0] > -1e9
    found_V = draws(logits_V, 4000, **changes)
    assert not found_V[~left_V].any()
    expected_V = torch.softmax(logits_V.masked_fill(~left_V, -torch.inf), dim=0)
    torch.testing.assert_close(found_V, expected_V, atol=0.03, rtol=0)


def test_a_nucleus_is_found_among_more_tokens_than_are_looked_at_first() -> None:
    logits_V = torch.zeros(5000)
    found_V = draws(logits_V, 3000, top_p=0.9)
    assert found_V[4600:].sum() == 0 or (found_V > 0).sum() > 1500
    assert len(found_V.nonzero()) > 1500


@given(uniform=st.floats(0, 1, exclude_max=True), top_p=st.floats(0.01, 1), top_k=st.integers(0, 60))
def test_a_draw_is_always_a_token_of_some_probability(uniform, top_p, top_k) -> None:
    logits_V = torch.linspace(-30, 30, 50)
    logits_V[::3] = -torch.inf
    token = draw(logits_V, sampling(top_p=top_p, top_k=top_k), uniform)
    assert logits_V[token] > -torch.inf


def test_a_repetition_penalty_is_that_of_transformers() -> None:
    logits_V = torch.randn(20)
    text = Text(sampling(repetition_penalty=1.7), prompt_ids=(3, 5), generated_ids=(7, 7))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 5, 7, 7]]), logits_V[None].clone())[0]
    torch.testing.assert_close(with_penalties(text, logits_V).float(), expected)


def test_presence_and_frequency_count_generated_tokens_alone() -> None:
    logits_V = torch.zeros(10)
    text = Text(
        sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 2.0}),
        prompt_ids=(1, 1),
        generated_ids=(4, 4, 6),
    )
    expected_V = torch.zeros(10, dtype=torch.float64)
    expected_V[4], expected_V[6], expected_V[9] = -1.0, -0.75, 2.0
    assert torch.equal(with_penalties(text, logits_V), expected_V)


def test_greedy_requests_take_penalties_and_biases_too() -> None:
    logits_BV = torch.tensor([[0.0, 1.0, 0.9], [0.0, 1.0, 0.9]])
    greedy = Text(SamplingParameters())
    biased = Text(SamplingParameters(logit_bias={2: 0.5}))
    assert [chosen(text, logits_BV[0]).id for text in (greedy, biased)] == [1, 2]


def test_log_probabilities_are_the_models_own() -> None:
    logits_BV = torch.randn(1, 30)
    text = Text(sampling(temperature=0.1, logit_bias={3: 50.0}), wants_logprobs=True, top_logprobs=4)
    token = chosen(text, logits_BV[0])
    logprobs_V = torch.log_softmax(logits_BV[0], dim=0)
    assert token.id == 3
    assert token.logprob == pytest.approx(float(logprobs_V[3]))
    assert [i for i, _ in token.top] == logprobs_V.topk(4).indices.tolist()
    assert [value for _, value in token.top] == pytest.approx(logprobs_V.topk(4).values.tolist())


AWKWARD = (0.0, 5e-324, 1e-300, 1e-40, 1e-30, 1e-7, 0.01, 0.5, 0.999999999, 1.0, 2.0, 99.9, 100.0, 1000.0)
numbers = st.sampled_from((*AWKWARD, *(-value for value in AWKWARD))) | st.floats(allow_nan=False)
ACCEPTABLE = st.fixed_dictionaries(
    {
        "temperature": numbers,
        "top_p": numbers,
        "min_p": numbers,
        "top_k": st.integers(0, 2**20),
        "seed": st.sampled_from((0, 2**63 - 1, 2**63, 2**64 - 1)) | st.integers(0, 2**64 - 1),
        "repetition_penalty": numbers,
        "presence_penalty": numbers,
        "frequency_penalty": numbers,
        "logit_bias": st.dictionaries(st.integers(0, 30), numbers, max_size=31),
    }
)
LOGITS = st.lists(
    st.sampled_from((0.0, 1.0, -1.0, 30.0, 1e-45, 3.4e38, -3.4e38, -torch.inf)) | st.floats(-1e4, 1e4, width=32),
    min_size=31,
    max_size=31,
).filter(lambda logits: max(logits) > -torch.inf)


@given(fields=ACCEPTABLE, logits=LOGITS, generated=st.lists(st.integers(0, 30), max_size=5))
@settings(max_examples=200, deadline=None)
@example(fields={"temperature": 1e-40, "top_p": 0.5}, logits=[1.0, 2.0] + [0.0] * 29, generated=[])
@example(fields={"temperature": 1.0, "top_p": 1e-50}, logits=[0.0] * 31, generated=[])
@example(fields={"temperature": 1.0, "repetition_penalty": 100.0, "min_p": 1.0}, logits=[-3.4e38] * 31, generated=[3])
def test_whatever_parameters_are_accepted_give_a_token_of_some_probability(fields, logits, generated) -> None:
    message = router_pb2.GenerateRequest(request_id="r", prompt_ids=[1, 2], logprobs=True, top_logprobs=3, **fields)
    try:
        request = decode_generation_request(message)
    except InvalidMessage:
        return  # a 400
    logits_V = torch.tensor(logits)
    text = Text(
        request.sampling, prompt_ids=(1, 2), generated_ids=tuple(generated), wants_logprobs=True, top_logprobs=3
    )
    token = chosen(text, logits_V)
    assert 0 <= token.id < 31 and logits_V[token.id] > -torch.inf
    assert token.logprob is not None and not math.isnan(token.logprob)
    if request.sampling.temperature and not request.sampling.logit_bias and not generated:
        tiny = replace(request.sampling, temperature=1e-40)
        greedy = replace(request.sampling, temperature=0.0)
        assert chosen(replace(text, sampling=tiny), logits_V).id == chosen(replace(text, sampling=greedy), logits_V).id


@pytest.mark.parametrize("penalty", [1e-40, 1e-3, -1.0, MAX_PENALTY * 2, float("nan")])
def test_a_repetition_penalty_that_would_overflow_is_refused_by_name(penalty) -> None:
    with pytest.raises(InvalidMessage, match=r"repetition_penalty: .* not within 0.01 and 100"):
        decode_generation_request(router_pb2.GenerateRequest(request_id="r", prompt="x", repetition_penalty=penalty))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_fail_their_own_request_alone(value, caplog) -> None:
    logits_BV = torch.randn(3, 20)
    alone = chosen(Text(sampling(seed=4)), logits_BV[2])
    logits_BV[1] = value
    outcomes = sample_tokens([Text(sampling()), Text(sampling(), name="sick"), Text(sampling(seed=4))], logits_BV)
    assert isinstance(outcomes[0], SampledToken) and outcomes[2] == alone
    assert isinstance(outcomes[1], RequestFailed) and "NaN or infinite" in str(outcomes[1])
    assert "sequence sick ends" in caplog.text


def test_one_nan_among_logits_is_noticed() -> None:
    logits_BV = torch.randn(1, 20)
    logits_BV[0, 7] = float("nan")
    (outcome,) = sample_tokens([Text(SamplingParameters())], logits_BV)
    assert isinstance(outcome, RequestFailed)

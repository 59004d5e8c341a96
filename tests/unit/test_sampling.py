from typing import Any

import pytest
import torch

from moecluster.generations import SamplingParameters
from moecluster.roles.sampling import KeyedSampler, gumbel_noise


def request(**changes: object) -> SamplingParameters:
    fields: dict[str, Any] = {"temperature": 1.0, **changes}
    return SamplingParameters(**fields)


def draws(logits: torch.Tensor, count: int, **changes: object) -> torch.Tensor:
    """Relative frequency of each token over `count` positions."""
    sampler: Any = KeyedSampler(request(**changes))
    found = [
        int(sampler(torch.zeros(1, position, dtype=torch.long), logits.clone()).argmax()) for position in range(count)
    ]
    return torch.bincount(torch.tensor(found), minlength=logits.shape[1]) / count


def test_noise_depends_on_seed_and_position_alone() -> None:
    noise = gumbel_noise(3, position=7, size=50)
    torch.manual_seed(123)
    assert torch.equal(noise, gumbel_noise(3, position=7, size=50))
    assert not torch.equal(noise, gumbel_noise(4, position=7, size=50))
    assert not torch.equal(noise, gumbel_noise(3, position=8, size=50))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    expected = torch.softmax(logits[0] / temperature, dim=0)
    torch.testing.assert_close(draws(logits, 4000, temperature=temperature), expected, atol=0.03, rtol=0)


def test_top_k_and_top_p_leave_only_the_likely() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert (draws(logits, 300, top_k=2) > 0).tolist() == [True, True, False, False]
    assert (draws(logits, 300, top_p=0.5) > 0).tolist() == [True, False, False, False]

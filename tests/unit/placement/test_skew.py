import numpy as np
import pytest

from moecluster.placement.load.skew import load_entropy, overload_factor


def test_even_loads_have_entropy_1_and_no_overload() -> None:
    assert load_entropy(np.full(256, 3.0)) == pytest.approx(1.0)
    assert overload_factor(np.full(256, 3.0)) == 1.0


def test_one_expert_for_all_tokens_has_entropy_0() -> None:
    load_E = np.array([0.0, 8.0, 0.0, 0.0])
    assert load_entropy(load_E) == 0.0 and overload_factor(load_E) == 4.0


def test_two_of_four_experts_with_equal_loads_have_half_of_the_entropy() -> None:
    assert load_entropy(np.array([5.0, 5.0, 0.0, 0.0])) == pytest.approx(0.5)


def test_without_load_there_is_no_skew() -> None:
    assert load_entropy(np.zeros(4)) is None and overload_factor(np.zeros(4)) is None


def test_a_single_expert_is_even() -> None:
    assert load_entropy(np.array([3.0])) == 1.0

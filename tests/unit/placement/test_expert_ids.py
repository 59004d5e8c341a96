"""Expert ids as text: what is shown can be parsed, and anything else is refused the same way everywhere."""

import pytest

from moecluster.errors import ConfigError
from moecluster.placement.expert_ids import experts_named, parse_expert
from moecluster.types import ExpertId


def test_what_an_expert_is_shown_as_is_read_back() -> None:
    expert = ExpertId(layer=58, index=255)
    assert parse_expert(str(expert), "EXPERT") == expert
    assert experts_named(str(expert), {58: 256}, "EXPERT") == [expert]


@pytest.mark.parametrize(
    "text", ["", "3", "3/", "/3", "3/x", "-1/0", "0/-1", "1/2/3", " 1/2", "1/2\n", "٣/٣", "9" * 10 + "/0"]
)
def test_anything_else_is_refused_alike(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_expert(text, "EXPERT")
    assert str(caught.value) == f'EXPERT: got "{text}", expected layer/index such as 3/17'
    with pytest.raises(ConfigError) as caught:
        experts_named(text, {1: 4}, "--experts")
    assert str(caught.value) == f'--experts: got "{text}", expected layer/index such as 0/3, */1 or 2/*'


def test_one_expert_is_named_without_a_star() -> None:
    with pytest.raises(ConfigError, match=r'EXPERT: got "\*/1", expected layer/index such as 3/17'):
        parse_expert("*/1", "EXPERT")
    assert [str(e) for e in experts_named("*/1", {2: 4, 0: 2}, "EXPERT")] == ["0/1", "2/1"]
    assert [str(e) for e in experts_named("2/*", {2: 3, 0: 2}, "EXPERT")] == ["2/0", "2/1", "2/2"]

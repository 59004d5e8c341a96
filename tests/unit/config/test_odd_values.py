"""Values that TOML can express and no setting can hold end in one ConfigError of one line, as any other wrong value."""

from pathlib import Path

import pytest

from moecluster.config import load_config, read_config
from moecluster.config.load import override, parse_override
from moecluster.errors import ConfigError

DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a = {DEEP}", "not valid TOML: nested too deeply"),
        (f"[train]\nsteps = {'9' * 5000}", "not valid TOML: "),
        (f"[train]\nsteps = {10**400}", "train.steps: got 10000"),
        (f"[train]\nlr = {10**400}", "train.lr: got 10000"),
        (f"[train]\nlr = {2**63}", "expected an integer of at most 64 bits"),
        (f"[train]\nseed = {2**63}", "expected an integer of at most 64 bits"),
        (f"[train]\nseed = 0x{'f' * 5000}", "train.seed: got a number with thousands of digits"),
        (f"[train]\nbetas = [0x{'f' * 5000}, 0]", "train.betas[0]: got a number with thousands of digits"),
        (f"[train]\ndata = [0x{'f' * 5000}]", "train.data: got a number with thousands of digits"),
        (f"0x{'f' * 500} = 1", "unknown section"),
    ],
)
def test_a_file(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "odd.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("value", [DEEP, "9" * 5000, f"0x{'f' * 5000}", str(2**64)])
def test_an_override(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps: got "):
        read_config(override({}, dict([parse_override(f"train.steps={value}")])))


def test_the_largest_integers_are_taken() -> None:
    assert read_config({"train": {"seed": 2**63 - 1}}).train.seed == 2**63 - 1

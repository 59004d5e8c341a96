"""A retired name is refused, with the new name; values that a checkpoint saved under it are migrated."""

import dataclasses
from pathlib import Path

import pytest

from moecluster.config import load_config, read_config
from moecluster.config.load import SECTIONS, override, parse_override
from moecluster.config.retired import RETIRED, Renamed, current_names
from moecluster.errors import ConfigError

KNOWN = {f"{name}.{field.name}" for name, cls in SECTIONS.items() for field in dataclasses.fields(cls)}


def test_retired_names_are_free_and_lead_to_settings() -> None:
    assert not RETIRED.keys() & KNOWN
    assert {retired.to for retired in RETIRED.values() if isinstance(retired, Renamed)} <= KNOWN


@pytest.mark.parametrize("name", RETIRED)
def test_an_old_name_is_refused_with_what_became_of_it(name: str) -> None:
    section, key = name.split(".")
    with pytest.raises(ConfigError) as caught:
        read_config({section: {key: 1}}, source="mine.toml")
    assert str(caught.value) == f"mine.toml: {name} {RETIRED[name]}"


def test_a_file_and_an_override_get_one_error_for_all_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[serve]\ntarget_texts = 3\nport = -1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), dict([parse_override("train.deterministic=true")]))
    assert str(caught.value) == (
        f"{file}: serve.target_texts was renamed serve.target_requests; "
        "train.deterministic was removed: gradients are always summed in the same order"
    )
    with pytest.raises(ConfigError, match=r"controller\.target_utilisation was renamed controller\.target_utilization"):
        read_config(override({}, {"controller.target_utilisation": 0.5}))


def test_noted_settings_are_taken_over() -> None:
    noted = {"serve.target_texts": 3.0, "train.deterministic": True, "train.seed": 1}
    assert current_names(noted) == {"serve.target_requests": 3.0, "train.seed": 1}

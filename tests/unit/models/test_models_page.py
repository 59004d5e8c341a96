"""docs/models.md lists every family of the installed transformers as tested, with the code's own refusals."""

import json
from pathlib import Path

import pytest
import transformers

from moecluster.hf.interface import UNATTACHABLE_FAMILIES
from moecluster.models.native.build import register_native_family
from tests.support.models.families import FAMILIES, SEE_PADDING
from tools.family_trials import refusal_of
from tools.generate_models_page import PAGE, page, read_results, tried_version
from tools.moe_families import families_with_interface, families_without_interface

REGENERATE = "run `make models-page` and commit docs/models.json and docs/models.md"


@pytest.fixture(scope="module", autouse=True)
def native_family() -> None:
    register_native_family()


def test_the_page_is_what_was_found() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_results(), tried_version()), REGENERATE


def test_every_family_of_transformers_is_on_it() -> None:
    if transformers.__version__ != tried_version():
        pytest.skip(f"it was written with transformers {tried_version()}")
    known = {*families_with_interface(), *families_without_interface()}
    assert {trial.family for trial in read_results()} == known, REGENERATE
    assert {"mixtral", "qwen3_5_moe", "aria", "llama4"} <= known


def test_families_of_the_tests_are_equal_on_it() -> None:
    found = {trial.family: trial for trial in read_results()}
    for family in (FAMILIES.keys() | SEE_PADDING.keys()) - {"moecluster"}:
        assert found[family].experts == "equal", family
    for family in (*SEE_PADDING, "minimax"):
        assert found[family].batching == "padded, equal lengths", family


def test_nothing_on_it_is_wrong() -> None:
    """A family either equals transformers or is refused, and no output depends on the other requests of its batch."""
    for trial in read_results():
        assert trial.experts in ("equal", "refused"), json.dumps(trial.to_table())
        assert trial.batching in ("", "continuous", "padded", "padded, equal lengths"), json.dumps(trial.to_table())


def test_refusals_are_those_of_the_code(tmp_path: Path) -> None:
    refused = {trial.family: trial.reason for trial in read_results() if trial.experts == "refused"}
    assert {"glm4v_moe", "qwen3_vl_moe", "mistral4", "llama4"} <= refused.keys()
    assert refused.keys() >= UNATTACHABLE_FAMILIES
    for family, reason in refused.items():
        assert refusal_of(family, tmp_path / family) == reason, REGENERATE

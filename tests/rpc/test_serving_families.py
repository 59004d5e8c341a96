"""Every family of the parity suite serves: texts written together through a router are those of the whole model."""

from pathlib import Path

import pytest

from tests.families import FAMILIES
from tests.mixed_texts import assert_texts_of_the_whole_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_of_texts_is_what_the_whole_model_writes(family: str, tmp_path: Path) -> None:
    assert_texts_of_the_whole_model(family, tmp_path, seed=list(FAMILIES).index(family))

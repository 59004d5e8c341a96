"""Every family of the parity suite serves: requests batched by a router get the whole model's output."""

from pathlib import Path

import pytest

from tests.support.models.families import FAMILIES, SEE_PADDING
from tests.support.models.mixed_requests import assert_outputs_of_the_whole_model


@pytest.mark.parametrize("family", [*FAMILIES, *SEE_PADDING])
def test_a_mixed_batch_of_requests_is_what_the_whole_model_writes(family: str, tmp_path: Path) -> None:
    assert_outputs_of_the_whole_model(family, tmp_path, seed=[*FAMILIES, *SEE_PADDING].index(family))

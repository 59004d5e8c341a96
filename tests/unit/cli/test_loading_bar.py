"""The progress bar for loading experts, and its total."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from actors.loading_progress import bytes_to_load
from moecluster.cli.common.progress import loading_bar
from moecluster.models.experts.source import ExpertSource
from moecluster.placement.initial import initial_placement
from tests.support.models.families import make_model, save


def shown(*, is_terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=120)
    with loading_bar(console, "starting 4 expert actors") as on_loading:
        on_loading(0, 2_000_000_000)
        on_loading(1_500_000_000, 2_000_000_000)
        if is_terminal:
            assert console._live_stack  # something is drawn
    return output.getvalue()


def test_a_terminal_sees_the_bytes() -> None:
    text = shown(is_terminal=True)
    assert "loading experts" in text and "1.5/2.0 GB" in text


def test_a_file_sees_nothing() -> None:
    assert shown(is_terminal=False).strip() == ""


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "moecluster"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_is_what_all_experts_take(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = make_model(family)
    save(model, tmp_path, "per-expert")
    source = ExpertSource(tmp_path)
    placement = initial_placement("contiguous", {x.layer: x.num_experts for x in source.layers}, ("a", "b"))
    expected = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    assert bytes_to_load(source, placement, dtype) == expected * dtype.itemsize

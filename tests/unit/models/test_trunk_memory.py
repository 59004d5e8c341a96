"""Peak memory of loading a trunk is about the trunk's size, and of an expert the expert's: measured in own
processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, MixtralConfig

from tests.support.models.families import LAYOUTS, Layout, save

EXPERTS_BYTES = 2 * 8 * 3 * 512 * 2048 * 4  # layers, experts, projections, float32: 201 MB
EXPERT_BYTES = EXPERTS_BYTES // 16
MARGIN_BYTES = 48 * 2**20  # threads, allocator, the model's Python objects

# The kernel's high-water mark of this address space: ru_maxrss would inherit the parent's.
PROGRAM = """
import sys
from pathlib import Path
import torch
from transformers import MixtralForCausalLM
from moecluster.models.experts.source import ExpertSource
from moecluster.models.trunk import load_trunk
from moecluster.types import ExpertId

def status_bytes(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) * 1024

def peak_growth_bytes(work):
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark to what is resident now
    before = status_bytes("VmRSS")
    result = work()
    return result, status_bytes("VmHWM") - before

def load():
    if what == "whole":
        model = MixtralForCausalLM.from_pretrained(path)
        assert all(p.isfinite().all() for p in model.parameters())  # until then they may be pages of the file, unread
        return model
    model = load_trunk(path, lambda layer, x_TD, ids_TK, weights_TK: torch.zeros_like(x_TD))
    with torch.no_grad():
        model(torch.arange(8)[None])
    return model

def load_experts():
    source = ExpertSource(path)
    for index in range(4):
        source.load(ExpertId(layer=1, index=index))

what, path = sys.argv[1:]
model, load_peak = peak_growth_bytes(load)
_, experts_peak = peak_growth_bytes(load_experts)
print(sum(p.numel() * p.element_size() for p in model.parameters()), load_peak, experts_peak)
"""


def measure(what: str, directory: Path) -> tuple[int, int, int]:
    """Bytes of the model's parameters, and the peak growth of resident memory: for the model, then for four experts."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, str(directory)], capture_output=True, text=True, check=True
    )
    parameters, load_peak, experts_peak = map(int, done.stdout.split())
    return parameters, load_peak, experts_peak


@pytest.fixture(scope="module", params=LAYOUTS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout: Layout = request.param
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
    )
    path = tmp_path_factory.mktemp(layout)
    save(AutoModelForCausalLM.from_config(config), path, layout)
    return path


def test_neither_trunk_nor_expert_needs_the_memory_of_the_whole(directory: Path) -> None:
    trunk_bytes, load_peak, experts_peak = measure("trunk", directory)
    assert trunk_bytes < 20 * 2**20
    assert load_peak < trunk_bytes + MARGIN_BYTES
    # An expert, the pages of its file mapped while it is read, and the previous expert.
    assert experts_peak < 4 * EXPERT_BYTES + MARGIN_BYTES


def test_the_measurement_sees_a_whole_model(directory: Path) -> None:
    parameters, load_peak, _ = measure("whole", directory)
    assert parameters > EXPERTS_BYTES
    assert load_peak > EXPERTS_BYTES

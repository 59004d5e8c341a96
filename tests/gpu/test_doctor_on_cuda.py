"""doctor names the GPU and its memory."""

import torch

from moecluster.cli.commands.doctor import gpu
from moecluster.cli.commands.doctor.finding import Level
from moecluster.config import read_config


def test_every_device_is_named_with_its_memory() -> None:
    found = gpu.gpus(read_config({"cluster": {"gpus_per_router": 1.0}}))
    assert found.level is Level.OK
    assert found.found.count("free") == torch.cuda.device_count()
    assert torch.cuda.get_device_properties(0).name in found.found

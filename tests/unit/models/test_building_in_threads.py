"""Building models in several threads at once."""

from concurrent.futures import ThreadPoolExecutor

import torch

from moecluster.config.sections import ModelConfig
from moecluster.models.experts.layout import ExpertLayout
from moecluster.models.native.build import build_model
from moecluster.models.native.configuration import native_config


def test_initialization_survives_empty_models_in_other_threads():
    """transformers turns initialization off process-wide while it builds an empty model."""
    settings = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, expert_inner_size=16)
    before = build_model(settings, seed=1).state_dict()
    init_function = torch.nn.init.normal_
    with ThreadPoolExecutor(max_workers=8) as pool:
        empty = [pool.submit(ExpertLayout, native_config(settings)) for _ in range(40)]
        built = [pool.submit(build_model, settings, 1) for _ in range(4)]
        assert all(len(future.result().layers) == 2 for future in empty)
    assert torch.nn.init.normal_ is init_function
    for future in built:
        state = future.result().state_dict()
        assert all(torch.equal(state[name], value) for name, value in before.items())

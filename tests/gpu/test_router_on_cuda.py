"""A router whose trunk is on a GPU writes what the whole model writes on the CPU."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moecluster.client import Client
from moecluster.models.config import read_model_config
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.models.families import FAMILIES
from tests.support.models.mixed_requests import assert_outputs_of_the_whole_model
from tests.support.models.weight_versions import NEW_TOKENS, PROMPTS, done, requests_alone, save_version

NUM_UPDATES = 4
SAMPLED: Mapping[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "seed": 7,
}


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [save_version(tmp_path_factory.mktemp("model"), seed) for seed in (0, 1)]


@pytest.fixture
def cluster(versions: list[str]) -> Iterator[LoopbackCluster]:
    with LoopbackCluster(versions[0], device="cuda") as running:
        yield running


@pytest.fixture
def client(cluster: LoopbackCluster) -> Iterator[Client]:
    with Client(cluster.router_server.address) as connected:
        yield connected


def write_all(client: Client) -> dict[str, list[int]]:
    streams = {prompt: client.generate(prompt, max_new_tokens=NEW_TOKENS) for prompt in PROMPTS}
    for stream in streams.values():
        stream.text()
    return {prompt: list(stream.ids) for prompt, stream in streams.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_of_requests_is_what_the_whole_model_writes(family: str, tmp_path: Path) -> None:
    assert_outputs_of_the_whole_model(family, tmp_path, seed=list(FAMILIES).index(family), device="cuda")
    assert torch.cuda.max_memory_allocated() > 0


def test_a_layer_of_raw_hidden_states_is_what_it_is_on_the_cpu(client: Client, versions: list[str]) -> None:
    read_model_config(versions[0])  # makes the native family known
    model = AutoModelForCausalLM.from_pretrained(versions[0])
    x_TD = torch.randn(5, 32)
    y_TD, ids_TK, weights_TK = client.moe(1, x_TD)
    expected = model.model.layers[1].mlp(x_TD.unsqueeze(0))
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(y_TD, expected.reshape(5, 32), atol=1e-5, rtol=1e-4)
    assert ids_TK.shape == weights_TK.shape == (5, 2)


def test_sampled_requests_with_every_parameter_are_repeatable(client: Client) -> None:
    texts = [client.generate(PROMPTS[0], max_new_tokens=24, logprobs=True, top_logprobs=3, **SAMPLED) for _ in range(2)]
    first, second = (stream.text() for stream in texts)
    assert first == second and texts[0].ids == texts[1].ids
    logprobs = [token for stream in texts for token in stream.logprobs]
    assert len(logprobs) == sum(len(stream.ids) for stream in texts)
    assert all(token.logprob <= 0 and len(token.top) == 3 for token in logprobs)


def test_new_weights_replace_the_old_ones_on_the_gpu(
    cluster: LoopbackCluster, client: Client, versions: list[str]
) -> None:
    alone = [requests_alone(version) for version in versions]
    assert write_all(client) == alone[0]
    for turn in range(1, 1 + NUM_UPDATES):
        done(cluster, cluster.controller.update(versions[turn % 2]))
        assert write_all(client) == alone[turn % 2]

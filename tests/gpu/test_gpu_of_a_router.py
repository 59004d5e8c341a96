"""A router to which Ray gave a GPU holds its trunk there; one without leaves the GPU alone."""

from pathlib import Path

import torch

from tests.support.clusters.ray_cluster import RayCluster
from tests.support.clusters.ray_session import RaySession
from tests.support.models.weight_versions import NEW_TOKENS, PROMPTS, requests_alone, save_version

CONTEXT_BYTES = 100 * 2**20  # CUDA takes more than this for a process that computes


def free_bytes() -> int:
    """Of the GPU, whoever has the rest."""
    return torch.cuda.mem_get_info()[0]


def written_by(directory: str, num_gpus: int) -> tuple[dict[str, list[int]], int]:
    """(texts by prompt, what the cluster took of the GPU)."""
    before_bytes = free_bytes()
    with RayCluster(directory, {"cluster": {"num_expert_actors": 2, "gpus_per_router": num_gpus}}) as cluster:
        texts = {}
        with cluster.client() as client:
            for prompt in PROMPTS:
                stream = client.generate(prompt, max_new_tokens=NEW_TOKENS)
                stream.text()
                texts[prompt] = list(stream.ids)
        return texts, before_bytes - free_bytes()


def test_a_router_with_a_gpu_computes_on_it(ray_session: RaySession, tmp_path: Path) -> None:
    directory = save_version(tmp_path, seed=0)
    alone = requests_alone(directory)
    texts, taken_bytes = written_by(directory, 1)
    assert texts == alone and taken_bytes > CONTEXT_BYTES
    texts, taken_bytes = written_by(directory, 0)
    assert texts == alone and taken_bytes < CONTEXT_BYTES

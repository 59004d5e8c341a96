"""Memory for a checkpoint with 1 GB of experts: a router needs its trunk, an actor its own experts.

Actors read theirs at the same time, each with several threads, and pack them while they serve.

Peak memory is the kernel's high-water mark of a process's resident pages (VmHWM): anonymous and shared ones, and those
of mapped files. 130 to 190 MB of the latter are the code of libtorch, Ray and Python, which all processes of a host
share. They count, too; the router's own peak is also looked at without the files that it still maps at the end.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from moecluster.config.sections import ServeConfig
from moecluster.models.tokenizer.byte_level import VOCAB_SIZE, build_byte_tokenizer
from tests.support.clusters.ray_cluster import RayCluster
from tests.support.clusters.ray_session import RaySession
from tests.support.models.families import save

MB = 10**6
ROUTER_BYTES = 450 * MB  # besides the trunk, the configured KV cache and the configured shared memory
EXPERT_ACTOR_BYTES = 400 * MB  # besides the actor's experts; includes the code that all processes share
NUM_ACTORS = 4
PACKING_S = 3.0
# Mixtral's proportions.
LAYERS, EXPERTS, WIDTH, INNER = 4, 8, 896, 3136
HEADS, KV_HEADS = 14, 2
EXPERTS_BYTES = LAYERS * EXPERTS * 3 * WIDTH * INNER * 4  # float32


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A checkpoint on disk."""

    directory: Path
    trunk_bytes: int


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """Writes a shard for the trunk and one for each expert, one at a time. Deleted after the test."""
    directory = tmp_path_factory.mktemp("large")
    trunk = write_trunk(directory)
    weight_map = dict.fromkeys(trunk, "trunk.safetensors")
    for layer in range(LAYERS):
        for index in range(EXPERTS):
            shard = f"expert-{layer}-{index}.safetensors"
            weight_map |= dict.fromkeys(write_expert(directory / shard, layer, index), shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    yield Stored(directory=directory, trunk_bytes=sum(value.nbytes for value in trunk.values()))
    shutil.rmtree(directory)


def write_trunk(directory: Path) -> dict[str, torch.Tensor]:
    """Writes everything but the experts, from a model with tiny experts but the configuration of the large ones."""
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_local_experts=EXPERTS,
        max_position_embeddings=512,
    )
    save(MixtralForCausalLM(config), directory, "per-expert")
    whole = directory / "model.safetensors"
    trunk = {key: value for key, value in load_file(whole).items() if ".experts." not in key}
    whole.unlink()
    save_file(trunk, directory / "trunk.safetensors", metadata={"format": "pt"})
    config.intermediate_size = INNER
    config.save_pretrained(directory)
    build_byte_tokenizer().save_pretrained(directory)
    return trunk


def write_expert(shard: Path, layer: int, index: int) -> list[str]:
    """Writes one expert under the keys of the released Mixtral."""
    shapes = {"w1": (INNER, WIDTH), "w2": (WIDTH, INNER), "w3": (INNER, WIDTH)}
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{index}"
    tensors = {f"{prefix}.{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    return list(tensors)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident bytes of a process."""

    peak: int
    anonymous: int
    file: int
    shared: int

    @property
    def own_peak(self) -> int:
        return self.peak - self.file

    def __str__(self) -> str:
        now = {"anonymous": self.anonymous, "mapped files": self.file, "shared": self.shared}
        parts = ", ".join(f"{value / MB:.0f} MB {name}" for name, value in now.items())
        return f"peak {self.peak / MB:.0f} MB, {self.own_peak / MB:.0f} MB its own; now {parts}"


def cache_bytes(serve: ServeConfig) -> int:
    """Bytes of the full KV cache and of a batch's attention mask over it; float32."""
    keys_and_values = serve.max_cached_tokens * LAYERS * 2 * KV_HEADS * (WIDTH // HEADS)
    mask = serve.max_batch_tokens * (serve.max_cached_tokens + serve.max_batch_tokens)
    return 4 * (keys_and_values + mask)


def memory_of(pid: int) -> Memory:
    lines = [line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in lines if rest.endswith("kB")}
    return Memory(peak=sizes["VmHWM"], anonymous=sizes["RssAnon"], file=sizes["RssFile"], shared=sizes["RssShmem"])


@pytest.mark.timeout(240)
def test_the_router_holds_its_trunk_and_each_actor_its_own_experts(
    ray_session: RaySession, stored: Stored, record_property: Callable[[str, object], None]
) -> None:
    assert EXPERTS_BYTES > 2**30
    seen: list[tuple[int, int]] = []

    def on_loading(loaded_bytes: int, total_bytes: int) -> None:
        seen.append((loaded_bytes, total_bytes))

    tables = {"cluster": {"num_expert_actors": NUM_ACTORS}, "controller": {"policy": "static"}}  # a move takes more
    with RayCluster(stored.directory, tables, on_loading) as cluster:
        assert seen == sorted(seen) and seen[-1] == (EXPERTS_BYTES, EXPERTS_BYTES)
        with cluster.client() as client:
            stream = client.generate("memory " * 30, max_new_tokens=16)
            stream.text()
        assert stream.prompt_tokens == 210 and len(stream.ids) == 16
        time.sleep(PACKING_S)
        found = {actor: memory_of(pid) for actor, pid in cluster.pids().items()}
    for actor, memory in found.items():
        print(f"{actor}: {memory}")
        record_property(actor, str(memory))
    router = found.pop("router")
    # It maps its own segment and the actor's, for every actor.
    buffers_bytes = NUM_ACTORS * 2 * cluster.config.router.shared_memory_bytes
    own_bytes = ROUTER_BYTES + stored.trunk_bytes + cache_bytes(cluster.config.serve)
    assert router.peak < own_bytes + buffers_bytes
    assert router.own_peak < own_bytes
    del found["controller"]
    assert len(found) == NUM_ACTORS
    for actor, memory in found.items():
        assert memory.peak <= EXPERTS_BYTES // NUM_ACTORS + EXPERT_ACTOR_BYTES, actor

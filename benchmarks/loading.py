"""Measures how fast four real expert actors load a checkpoint's experts, and how much memory each process uses for it.

In turns: reading the same files by `readinto` into one reused buffer, which is the fastest the page cache allows, by
one process and by four; reading them into memory that is kept, as any loader must; and the actors' load, from the first
request to the last reply, after which the experts are served. Then again with the files evicted from the page cache,
which shows the disk's speed. Packing continues in the background after the load and is timed separately. A copy of the
files with moecluster's checksums, as in its own checkpoints and exports, is loaded as well.

The host of a virtual machine may reclaim memory that is free for seconds, and then every page costs several times as
much when it is used again. So each turn loads twice, the second time right after unloading, and reports both.

    python -m benchmarks.loading
    python -m benchmarks.loading --gigabytes 0.2    # a quick check that it works
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import MixtralConfig

from actors.expert_actor import ExpertActor
from actors.given_directories import GivenDirectories
from actors.names import Endpoints
from actors.ray_calls import call
from actors.spawn import spawn
from benchmarks.report import MIN_RUNS, Report, Row, installed_versions
from benchmarks.workers.plain_read import read_files, throw_out
from moecluster.config import Config, read_config
from moecluster.models.experts.source import ExpertSource
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.training.tensor_file import write_tensors
from moecluster.types import ExpertId

NUM_ACTORS = 4
EXPERTS, WIDTH, INNER = 8, 1024, 3584
RUNS = 7
LOAD_TIMEOUT_S = 300.0
SAMPLE_S = 0.02
WANTED_RATE = 0.8  # target, as a fraction of the sequential read rate
WANTED_BYTES = 400e6  # target for an actor's memory beyond its own experts
GB, MB = 1e9, 1e6
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

assert RUNS >= MIN_RUNS


class LoadedActor(ExpertActor):
    """An expert actor that reports when its experts are packed."""

    def wait_packed(self, timeout_s: float) -> bool:
        return self._service.wait_packed(timeout_s)


@dataclass(kw_only=True)
class Found:
    """The measurements of one dtype: name -> one value per run."""

    runs: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.runs.setdefault(name, []).append(value)

    def ratios(self, name: str, baseline: str) -> list[float]:
        """Returns the ratios to the baseline's median, since runs of different measurements do not pair up."""
        return [value / statistics.median(self.runs[baseline]) for value in self.runs[name]]


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Two checkpoints with the same experts."""

    plain: Path
    summed: Path  # with checksums in the files' headers
    experts_bytes: int  # of one checkpoint


class Actors:
    """Four expert actors without a controller. Each gets a contiguous part of the experts."""

    def __init__(self, config: Config, checkpoints: "Checkpoints", dtype: str) -> None:
        self._dtype = dtype
        experts = [
            ExpertId(layer=layer.layer, index=index)
            for layer in ExpertSource(checkpoints.plain).layers
            for index in range(layer.num_experts)
        ]
        self.names = [f"expert-{i}" for i in range(NUM_ACTORS)]
        part = -(-len(experts) // NUM_ACTORS)
        self._experts = {name: experts[i * part : (i + 1) * part] for i, name in enumerate(self.names)}
        for directory in (checkpoints.plain, checkpoints.summed):
            GivenDirectories(config.cluster.name).give(str(directory))
        tables, credentials = config.to_tables(), ClusterCredentials.make()
        self._handles: dict[str, Any] = {
            name: spawn(LoadedActor, "expert", config, name, tables, credentials, name, 0) for name in self.names
        }
        reached: dict[str, Endpoints] = {
            name: call(handle.endpoints.remote(), LOAD_TIMEOUT_S, name) for name, handle in self._handles.items()
        }
        self.pids = {name: endpoints.pid for name, endpoints in reached.items()}
        self._controls = {
            name: GrpcExpertControl(name, reached[name].address, credentials=credentials) for name in self.names
        }

    def load(self, checkpoint: Path) -> tuple[float, float, int]:
        """Returns seconds until all experts are loaded, seconds from then until they are packed, and bytes loaded."""
        began_s = time.perf_counter()
        loaded_bytes = sum(self._everywhere(lambda name: self._load(name, checkpoint)))
        loaded_s = time.perf_counter()
        assert all(self._everywhere(self._wait_packed))
        return loaded_s - began_s, time.perf_counter() - loaded_s, loaded_bytes

    def unload(self) -> None:
        self._everywhere(lambda name: self._controls[name].unload(term=1, experts=self._experts[name]))

    def hosted_bytes(self) -> dict[str, int]:
        return {name: self._controls[name].status().hosted_bytes for name in self.names}

    def close(self) -> None:
        for name, handle in self._handles.items():
            self._controls[name].close()
            ray.kill(handle, no_restart=True)

    def _load(self, name: str, checkpoint: Path) -> int:
        return self._controls[name].load(
            LoadRequest(
                term=1,
                experts=tuple(self._experts[name]),
                checkpoint=str(checkpoint),
                dtype=self._dtype,
                timeout_s=LOAD_TIMEOUT_S,
            )
        )

    def _wait_packed(self, name: str) -> bool:
        return bool(call(self._handles[name].wait_packed.remote(LOAD_TIMEOUT_S), LOAD_TIMEOUT_S, name))

    def _everywhere(self, ask: Callable[[str], Any]) -> list[Any]:
        with ThreadPoolExecutor(max_workers=NUM_ACTORS) as pool:
            return list(pool.map(ask, self.names))


class Memory:
    """Peak memory of each process while the block runs: resident (VmHWM), and private (sampled)."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.private_bytes = dict.fromkeys(pids, 0)
        self.resident_bytes: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Memory":
        for pid in self._pids.values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the high-water mark
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.resident_bytes = {
            name: _kilobytes(Path(f"/proc/{pid}/status"), ("VmHWM",)) for name, pid in self._pids.items()
        }

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            for name, pid in self._pids.items():
                private = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), ("Private_Clean", "Private_Dirty"))
                self.private_bytes[name] = max(self.private_bytes[name], private)


def _kilobytes(file: Path, names: Sequence[str]) -> int:
    lines = (line.partition(":") for line in file.read_text().splitlines())
    return sum(int(rest.split()[0]) * 1024 for name, _, rest in lines if name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint's experts")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of everything, at least {MIN_RUNS}")
    parser.add_argument("--directory", type=Path, default=None, help="where the checkpoint is written, then removed")
    given = parser.parse_args()
    console = Console()
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    with ray_running():
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory(dir=given.directory) as folder:
                checkpoints = write_checkpoints(Path(folder), dtype, given.gigabytes)
                console.print(f"{dtype}: {checkpoints.experts_bytes / GB:.2f} GB of experts")
                found = measure(checkpoints, dtype, given.runs)
            rows += rows_of(dtype, found)
            raw[dtype] = {"experts_bytes": checkpoints.experts_bytes, "runs": found.runs}
    report = Report(name="loading", rows=rows, raw=raw, versions=installed_versions())
    report.print(console)
    console.print(f"written to {report.write()}")


def write_checkpoints(folder: Path, dtype: str, gigabytes: float) -> Checkpoints:
    """Writes Mixtral checkpoints with experts only, one shard per layer."""
    expert_bytes = 3 * WIDTH * INNER * DTYPES[dtype].itemsize
    layers = max(round(gigabytes * GB / expert_bytes / EXPERTS), 1)
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers, num_local_experts=EXPERTS
    )
    written = Checkpoints(
        plain=folder / "plain", summed=folder / "summed", experts_bytes=layers * EXPERTS * expert_bytes
    )
    for directory in (written.plain, written.summed):
        config.save_pretrained(directory)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (INNER, WIDTH), "w2": (WIDTH, INNER), "w3": (INNER, WIDTH)}
    weights = {name: torch.randn(shape, generator=generator).to(DTYPES[dtype]) for name, shape in shapes.items()}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        tensors = {
            f"{prefix}.{index}.{name}.weight": value.clone()
            for index in range(EXPERTS)
            for name, value in weights.items()
        }
        shard = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, written.plain / shard, metadata={"format": "pt"})
        write_tensors(written.summed / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    for directory in (written.plain, written.summed):
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    os.sync()  # or the kernel writes back during the measurement, and cannot evict dirty pages
    return written


def measure(checkpoints: Checkpoints, dtype: str, runs: int) -> Found:
    """Measures everything in turns. The first turn is not counted."""
    files, summed_files = (sorted(d.glob("*.safetensors")) for d in (checkpoints.plain, checkpoints.summed))
    found = Found()
    config = read_config({"cluster": {"name": "bench-loading", "num_expert_actors": NUM_ACTORS}})
    with ExitStack() as stack:
        actors = stack.enter_context(closing(Actors(config, checkpoints, dtype)))
        readers = stack.enter_context(ProcessPoolExecutor(NUM_ACTORS, mp_context=multiprocessing.get_context("spawn")))
        list(readers.map(os.path.getsize, [files[0]] * NUM_ACTORS * 8))  # starts all processes
        for run in range(runs + 1):
            kept = found if run else Found()
            read_plainly(readers, files, kept, "warm")
            load(actors, checkpoints.plain, kept, "warm, first")
            load(actors, checkpoints.plain, kept, "warm")
            rate(readers, [summed_files], keep=False)
            load(actors, checkpoints.summed, kept, "checksums, warm")
            throw_out([*files, *summed_files])
            kept.add("read, 1 process, cold", rate(readers, [files], keep=False))
            weigh(actors, checkpoints.plain, kept)
            throw_out(files)
            load(actors, checkpoints.plain, kept, "cold")
            load(actors, checkpoints.summed, kept, "checksums, cold")
    return found


def read_plainly(readers: ProcessPoolExecutor, files: Sequence[Path], found: Found, cache: str) -> None:
    quarters = [files[i::NUM_ACTORS] for i in range(NUM_ACTORS)]
    found.add(f"read, 1 process, {cache}", rate(readers, [files], keep=False))
    found.add(f"read, 4 processes, {cache}", rate(readers, quarters, keep=False))
    found.add(f"read into memory that stays, 1 process, {cache}", rate(readers, [files], keep=True))
    found.add(f"read into memory that stays, 4 processes, {cache}", rate(readers, quarters, keep=True))


def rate(readers: ProcessPoolExecutor, parts: Sequence[Sequence[Path]], *, keep: bool) -> float:
    """Returns bytes per second for reading all parts at once, from the first start to the last end."""
    spans = [future.result() for future in [readers.submit(read_files, list(part), keep) for part in parts if part]]
    seconds = max(span.end_s for span in spans) - min(span.begin_s for span in spans)
    return sum(span.num_bytes for span in spans) / seconds


def load(actors: Actors, checkpoint: Path, found: Found, cache: str) -> None:
    load_s, pack_s, loaded_bytes = actors.load(checkpoint)
    found.add(f"load, {cache}", loaded_bytes / load_s)
    found.add(f"packed after, {cache}", pack_s)
    actors.unload()


def weigh(actors: Actors, checkpoint: Path, found: Found) -> None:
    """Measures memory in a separate load, since sampling a process's pages slows down its allocations."""
    with Memory(actors.pids) as memory:
        actors.load(checkpoint)
    hosted = actors.hosted_bytes()
    found.add("resident beside its part", max(memory.resident_bytes[name] - hosted[name] for name in actors.names))
    found.add("private beside its part", max(memory.private_bytes[name] - hosted[name] for name in actors.names))
    actors.unload()


def rows_of(dtype: str, found: Found) -> list[Row]:
    def gigabytes(name: str) -> Row:
        return Row(name=f"{dtype}: {name}", runs=[value / GB for value in found.runs[name]], unit="GB/s")

    def part(name: str, baseline: str, target: float | None) -> Row:
        return Row(
            name=f"{dtype}: {name}, part of {baseline}", runs=found.ratios(name, baseline), unit="x", target=target
        )

    def beside(name: str, target: float | None) -> Row:
        runs = [value / MB for value in found.runs[name]]
        target = None if target is None else target / MB
        return Row(name=f"{dtype}: an actor's memory, {name}", runs=runs, unit="MB", target=target, better="lower")

    stays = "read into memory that stays"
    return [
        *(gigabytes(f"read, {n}, warm") for n in ("1 process", "4 processes")),
        *(gigabytes(f"{stays}, {n}, warm") for n in ("1 process", "4 processes")),
        gigabytes("load, warm, first"),
        gigabytes("load, warm"),
        part("load, warm", "read, 1 process, warm", WANTED_RATE),
        part("load, warm", "read, 4 processes, warm", None),
        part("load, warm", f"{stays}, 4 processes, warm", None),
        gigabytes("read, 1 process, cold"),
        gigabytes("load, cold"),
        part("load, cold", "read, 1 process, cold", WANTED_RATE),
        gigabytes("load, checksums, warm"),
        part("load, checksums, warm", "load, warm", None),
        gigabytes("load, checksums, cold"),
        part("load, checksums, cold", "load, cold", None),
        Row(name=f"{dtype}: packed after the load", runs=found.runs["packed after, warm"], unit="s", better="lower"),
        beside("resident beside its part", WANTED_BYTES),
        beside("private beside its part", None),
    ]


@contextmanager
def ray_running() -> Iterator[None]:
    with ExitStack() as stack:
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.FATAL)
        stack.callback(ray.shutdown)
        yield


if __name__ == "__main__":
    main()

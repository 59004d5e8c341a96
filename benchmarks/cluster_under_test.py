"""Starts a whole cluster for a benchmark, with this process as an additional router."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.driver import Cluster
from actors.ray_calls import controller_resolver
from actors.router_actor import make_remote_experts
from moecluster.config import read_config
from moecluster.config.sections import ModelConfig
from moecluster.dispatch.load_counts import LoadReporter
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.metrics import Metrics
from moecluster.models.native.build import build_model
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.rpc.controller.subscription import ControllerClient
from moecluster.rpc.credentials import ClusterCredentials


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A cluster, and this process's connection to its experts."""

    name: str
    driver: Cluster
    remote: RemoteExperts
    placements: ControllerClient


def save_model(directory: Path, *, num_experts: int, hidden_size: int, inner_size: int, top_k: int) -> None:
    """Writes a native model with one MoE layer."""
    model = ModelConfig(
        hidden_size=hidden_size, num_layers=1, num_experts=num_experts, expert_inner_size=inner_size, top_k=top_k
    )
    build_model(model, seed=0).save_pretrained(directory)
    build_byte_tokenizer().save_pretrained(directory)


@contextmanager
def started(name: str, directory: str, tables: Mapping[str, Mapping[str, Any]]) -> Iterator[Contender]:
    """Starts two expert actors, a controller and a router that serve the model. Ray must be initialized."""
    cluster = {"name": f"bench-{name}", "num_expert_actors": 2, **tables.get("cluster", {})}
    config = read_config({**tables, "cluster": cluster})
    driver, credentials = Cluster(config.cluster.name), ClusterCredentials.make()
    with ExitStack() as stack:
        driver.start(config, directory, credentials=credentials)
        stack.callback(driver.stop)
        placements = ControllerClient(
            router="bench", resolve=controller_resolver(config.cluster.name), credentials=credentials
        )
        stack.callback(placements.close)
        remote = make_remote_experts(config, placements, Metrics(model=config.cluster.name), credentials)
        stack.callback(remote.close)
        reporter = LoadReporter(remote.loads, placements.report_load)
        stack.callback(reporter.close)
        yield Contender(name=name, driver=driver, remote=remote, placements=placements)

"""Streams over the HTTP gateway while expert actors, routers and the controller are killed at random."""

import asyncio
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from transformers import AutoModelForCausalLM

from actors.names import CONTROLLER
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource
from moecluster.models.native.build import register_native_family
from moecluster.models.tokenizer.load import load_tokenizer
from tests.support.clusters.ray_cluster import CREDENTIALS, RayCluster
from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.soak.generation_load import save_decided_model
from tests.support.soak.http_load import HttpClients, StreamedRequest, assert_all_right, clear_texts, stream_request

NEW_TOKENS = 80
NUM_PROMPTS = 12
CANDIDATES = [f"{word} {number}" for number in range(40) for word in ("The tower", "import os", "class Cat")]
SETTINGS = {
    "cluster": {"num_expert_actors": 3, "num_routers": 2},
    "controller": {"slots_per_layer": 4, "period_s": 1.0, "window_s": 5.0},
    "serve": {"max_running": 64},
}


@dataclass(kw_only=True)
class Outcome:
    """The results of a run."""

    texts: Sequence[StreamedRequest] = ()
    kills: list[tuple[str, float]] = field(default_factory=list)  # actor, when
    rss_mb: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # actor/pid -> (seconds in, megabytes)


def serve_under_kills(
    directory: Path,
    *,
    duration_s: float,
    kill_every_s: float,
    clients: int,
    seed: int,
    watch_every_s: float = 10.0,
    spared: Collection[str] = (),
) -> Outcome:
    """Asserts that no request failed and every output is right. Kills a random actor of each kind in turn.

    spared: actors that are not killed, to watch their memory; CONTROLLER among them is still killed in the first half.
    """
    model_dir = save_decided_model(directory)
    register_native_family()
    whole = AutoModelForCausalLM.from_pretrained(model_dir)
    greedy = clear_texts(whole, load_tokenizer(model_dir), CANDIDATES, NEW_TOKENS, NUM_PROMPTS)
    with RayCluster(model_dir, SETTINGS) as cluster, running_gateway(_source(cluster)) as gateway:
        sampled = asyncio.run(_sampled(gateway, list(greedy)))
        choose, outcome = random.Random(seed), Outcome()
        load = HttpClients(gateway.url, "model", list(greedy), number=clients, new_tokens=NEW_TOKENS)
        with load:
            began_s = time.monotonic()
            next_kill_s, next_watch_s = began_s + kill_every_s, began_s + watch_every_s
            while (now_s := time.monotonic()) < began_s + duration_s:
                if now_s >= next_watch_s:
                    _watch(cluster, outcome, now_s - began_s)
                    next_watch_s += watch_every_s
                if now_s >= next_kill_s:
                    kept = {*spared} - {CONTROLLER} if now_s < began_s + duration_s / 2 else {*spared}
                    actor = _victim(cluster, choose, turn=len(outcome.kills), spared=kept)
                    cluster.kill(actor)
                    outcome.kills.append((actor, time.monotonic()))
                    next_kill_s += kill_every_s
                time.sleep(0.05)
        outcome.texts = tuple(load.texts)
        assert_all_right(outcome.texts, greedy, sampled, NEW_TOKENS)
        cluster.wait_served()
    return outcome


def describe(outcome: Outcome) -> dict[str, float]:
    """Returns the figures of a run; times in seconds."""
    gaps = np.concatenate([np.diff(t.chunks_s) for t in outcome.texts])
    first = np.array([t.chunks_s[0] - t.started_s for t in outcome.texts])
    return {
        "texts": len(outcome.texts),
        "kills": len(outcome.kills),
        "streams that a kill met": sum(
            any(t.started_s < at_s < t.ended_s for _, at_s in outcome.kills) for t in outcome.texts
        ),
        "tokens": sum(t.tokens for t in outcome.texts),
        "first token p50": float(np.percentile(first, 50)),
        "first token p99": float(np.percentile(first, 99)),
        "between tokens p50": float(np.percentile(gaps, 50)),
        "between tokens p99": float(np.percentile(gaps, 99)),
        "longest wait": float(gaps.max()),
    }


def _source(cluster: RayCluster) -> ModelSource:
    def look() -> ClusterAddresses:
        return ClusterAddresses(
            routers=cluster.driver.router_addresses(),
            controller=cluster.driver.controller_address(),
            credentials=CREDENTIALS,
        )

    return ModelSource(name="model", seeds=look(), rediscover=look)


async def _sampled(gateway: RunningGateway, prompts: Sequence[str]) -> dict[str, str]:
    """Returns the sampled outputs while nothing is killed."""
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60.0) as client:
        texts = [await stream_request(client, "model", p, new_tokens=NEW_TOKENS, sampled=True) for p in prompts]
    assert not any(text.failure for text in texts), texts
    return {text.prompt: text.text for text in texts}


def _victim(cluster: RayCluster, choose: random.Random, *, turn: int, spared: Collection[str]) -> str:
    """Picks in turn an expert actor, a router, an expert actor, the controller, among those that have a process."""
    kind = ("expert-", "router", "expert-", CONTROLLER)[turn % 4]
    living = sorted(name for name in cluster.pids(1.0) if name not in spared)
    of_kind = [name for name in living if name.startswith(kind)]
    return choose.choice(of_kind or living)


def _watch(cluster: RayCluster, outcome: Outcome, at_s: float) -> None:
    for name, pid in cluster.pids(1.0).items():
        try:
            rss_mb = psutil.Process(pid).memory_info().rss / 1e6
        except psutil.NoSuchProcess:
            continue
        outcome.rss_mb.setdefault(f"{name}/{pid}", []).append((at_s, rss_mb))

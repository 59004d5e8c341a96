"""Generation under load while actors are killed: a run, long or short, for faults and soak tests."""

import dataclasses
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from transformers import AutoModelForCausalLM

from actors.names import CONTROLLER
from moecluster.errors import MoeClusterError
from moecluster.models.native.build import build_model, register_native_family
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.types import ExpertId
from tests.support.clusters.fake_actors import TINY
from tests.support.clusters.ray_cluster import RayCluster
from tests.support.models.near_ties import is_near_tie

PROMPTS = ("def add(a, b):", "The tower of", "#include <vector>", "import os", "class Cat", "for i in range(10):")
NEW_TOKENS = 120
NUM_CLIENTS = 4
JOIN_TIMEOUT_S = 90.0


def save_decided_model(directory: Path, *, num_experts: int = TINY.num_experts) -> str:
    """Saves a byte-level model with logits far enough apart that each prompt has a greedy output of its own."""
    model = dataclasses.replace(TINY, initializer_range=0.2, num_experts=num_experts)
    build_model(model, 0).save_pretrained(directory)
    build_byte_tokenizer().save_pretrained(directory)
    return str(directory)


@dataclass(frozen=True, kw_only=True)
class Text:
    """One generation, as a client saw it. Times by time.monotonic."""

    prompt: str
    ids: tuple[int, ...]
    failure: str  # empty: none
    started_s: float
    ended_s: float
    chunks_s: tuple[float, ...]  # when each chunk arrived, mostly one token
    experts: Mapping[ExpertId, int]  # assignments of prompt and generated tokens


@dataclass(kw_only=True)
class Outcome:
    """What clients received, and which actors were killed meanwhile."""

    texts: list[Text] = field(default_factory=list)
    kills: list[tuple[str, float]] = field(default_factory=list)  # actor, when


class Clients:
    """NUM_CLIENTS threads that send one request after another, from __enter__ to __exit__."""

    def __init__(self, cluster: RayCluster) -> None:
        self.texts: list[Text] = []
        self._cluster = cluster
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(NUM_CLIENTS)]

    def _run(self, number: int) -> None:
        turn = number
        while not self._over.is_set():
            self.texts.append(generate(self._cluster, PROMPTS[turn % len(PROMPTS)]))
            turn += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        deadline_s = time.monotonic() + JOIN_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0.0))
        assert not any(thread.is_alive() for thread in self._threads), "a generation hangs"


def generate(cluster: RayCluster, prompt: str) -> Text:
    started_s, failure, chunks_s = time.monotonic(), "", []
    with cluster.client() as client:
        stream = client.generate(prompt, max_new_tokens=NEW_TOKENS)
        try:
            for chunk in stream:
                if chunk.ids:
                    chunks_s.append(time.monotonic())
            if stream.finish_reason not in ("stop", "length"):
                failure = f"ended by {stream.finish_reason!r}"
        except MoeClusterError as exc:
            failure = f"{type(exc).__name__}: {exc}"
    return Text(
        prompt=prompt,
        ids=tuple(stream.ids),
        failure=failure,
        started_s=started_s,
        ended_s=time.monotonic(),
        chunks_s=tuple(chunks_s),
        experts=stream.experts,
    )


def generate_under_kills(cluster: RayCluster, *, duration_s: float, kill_every_s: float, seed: int = 0) -> Outcome:
    """Clients generate without a pause; at a random moment of each period a random expert actor is killed.

    The controller is killed once, at half time.
    """
    choose, outcome = random.Random(seed), Outcome()
    experts = [actor.actor for actor in cluster.wait_served().actors]
    periods = int(duration_s / kill_every_s)
    schedule = [(kill_every_s * (k + choose.random()), choose.choice(experts)) for k in range(periods)]
    schedule = sorted([*schedule, (duration_s / 2, CONTROLLER)])
    with Clients(cluster) as clients:
        started_s = time.monotonic()
        for at_s, actor in schedule:
            time.sleep(max(started_s + at_s - time.monotonic(), 0.0))
            cluster.kill(actor)
            outcome.kills.append((actor, time.monotonic()))
        time.sleep(max(started_s + duration_s - time.monotonic(), 0.0))
    outcome.texts += clients.texts
    return outcome


def count_near_ties(texts: Sequence[Text], undisturbed: Mapping[str, Sequence[int]], directory: str) -> int:
    """Returns how many outputs differ from the undisturbed ones. Asserts that no request failed, that each difference
    starts at a near tie, and that at most one output in 20 differs."""
    failed = [
        f"{text.prompt}: {text.failure}, {len(text.ids)} tokens in {text.ended_s - text.started_s:.1f} s"
        for text in texts
        if text.failure
    ]
    assert not failed, failed
    different = [text for text in texts if text.ids != tuple(undisturbed[text.prompt])]
    register_native_family()
    whole = AutoModelForCausalLM.from_pretrained(directory)
    for text in different:
        prompt = list(text.prompt.encode())
        assert is_near_tie(whole, prompt, text.ids, undisturbed[text.prompt]), f"{text.prompt}: {text.ids}"
    assert len(different) <= len(texts) / 20
    return len(different)


def assert_undisturbed(outcome: Outcome, undisturbed: Mapping[str, Sequence[int]], directory: str) -> None:
    """Asserts that no request failed and every output is the undisturbed one, except for near ties, and that every
    kill fell into a generation."""
    excused = count_near_ties(outcome.texts, undisturbed, directory)
    across = [actor for actor, at_s in outcome.kills if any(t.started_s < at_s < t.ended_s for t in outcome.texts)]
    longest_s = max(text.ended_s - text.started_s for text in outcome.texts)
    print(f"{len(outcome.texts)} texts, the slowest in {longest_s:.1f} s, {excused} excused as near ties")
    print("killed amid texts:", ", ".join(across))
    assert across == [actor for actor, _ in outcome.kills]

"""Weight versions of a tiny model, the outputs of each alone, and clients that must not notice a change."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM

from moecluster.generation import GenerationRequest
from moecluster.models.native.build import build_model, register_native_family
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.types import Operation, OperationPhase
from tests.support.clusters.fake_actors import TINY
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.waiting import WAIT_S, wait_until

PROMPTS = ("def add(a, b):", "import os", "class Cat")
NEW_TOKENS = 60
NUM_CLIENTS = 3


def save_version(directory: Path, seed: int, **model: Any) -> str:
    """Saves a byte-level model with logits far enough apart that its greedy outputs are its own."""
    build_model(dataclasses.replace(TINY, **{"initializer_range": 0.2, **model}), seed).save_pretrained(directory)
    build_byte_tokenizer().save_pretrained(directory)
    return str(directory)


def requests_alone(directory: str) -> dict[str, list[int]]:
    """Returns the greedy output of the whole model in one process, by prompt."""
    register_native_family()
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    texts = {}
    for prompt in PROMPTS:
        ids = torch.tensor([list(prompt.encode())])
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(ids))
        texts[prompt] = [int(token) for token in out[0, len(prompt) :]]
    return texts


@dataclass(frozen=True, kw_only=True)
class Written:
    """A completed request."""

    prompt: str
    ids: list[int]
    weight_version: int
    ended_s: float


def write(cluster: LoopbackCluster, prompt: str, name: str = "text") -> Written:
    ids: list[int] = []
    version = 0
    request = GenerationRequest(request_id=name, prompt=prompt, max_new_tokens=NEW_TOKENS)
    for chunk in cluster.router.generate(request):
        ids += chunk.ids
        version = chunk.weight_version or version
    return Written(prompt=prompt, ids=ids, weight_version=version, ended_s=time.monotonic())


class Clients:
    """Threads that send one request after another. Asserts that none failed, and that each output is its version's."""

    def __init__(self, cluster: LoopbackCluster, alone: Sequence[dict[str, list[int]]]) -> None:
        """alone: the outputs of each version alone, from version 1 on."""
        self.texts: list[Written] = []
        self.failures: list[str] = []
        self._cluster = cluster
        self._alone = alone
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(NUM_CLIENTS)]

    def _run(self, number: int) -> None:
        turn = number
        while not self._over.is_set():
            try:
                self.texts.append(write(self._cluster, PROMPTS[turn % len(PROMPTS)], f"client-{number}"))
            except Exception as exc:
                self.failures.append(repr(exc))
            turn += 1

    def versions(self) -> set[int]:
        return {text.weight_version for text in self.texts}

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: len(self.texts) >= NUM_CLIENTS, "the first texts")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT_S)
        assert not self.failures, self.failures[:3]
        for text in self.texts:
            assert text.ids == self._alone[text.weight_version - 1][text.prompt], text


def ended(cluster: LoopbackCluster, operation: Operation) -> Operation:
    wait_until(lambda: cluster.controller.operation(operation.id).phase.ended, str(operation))
    return cluster.controller.operation(operation.id)


def done(cluster: LoopbackCluster, operation: Operation) -> Operation:
    finished = ended(cluster, operation)
    assert finished.phase is OperationPhase.DONE, finished
    return finished

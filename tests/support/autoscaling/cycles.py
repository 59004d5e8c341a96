"""Cycles of load under which Ray's autoscaler brings a node and takes it, as a program for a namespace of its own.

usage: python -m tests.support.autoscaling.cycles FOLDER KIND...
Writes FOLDER/cycles.json: each cycle's times, what every process that outlives the cycles held after it, and the
numbers of requests. Ends with an error if a request failed, an output was wrong, or something did not come true.

KIND of a cycle: how its node goes.
idle: the load ends, the controller empties the node, the autoscaler takes it.
long: the same after many more requests, which fill what processes keep of them; to begin with.
drained: under load, Ray is told that the node is preempted, with a deadline; experts and a router leave it.
terminated: under load, the node's first process gets SIGTERM and a grace period, as a pod does; experts leave it.
"""

import asyncio
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # as `ray drain-node` does
from ray.core.generated import autoscaler_pb2
from transformers import AutoModelForCausalLM

from actors.names import is_router
from moecluster.models.native.build import register_native_family
from moecluster.models.tokenizer.load import load_tokenizer
from moecluster.types import OperationKind, OperationPhase
from tests.support.autoscaling.autoscaled_ray import GCS_ADDRESS, AutoscaledRay, first_process_of
from tests.support.autoscaling.footprint import Footprint, footprints, shared_folder_bytes
from tests.support.autoscaling.served_cluster import (
    HEAD_CPUS,
    MAX_WORKERS,
    MODEL,
    URL,
    WORKER_CPUS,
    ServedCluster,
    served,
)  # fmt: skip
from tests.support.clusters.fake_actors import TINY
from tests.support.hosts.http_clients import Load, ask_once
from tests.support.soak.generation_load import save_decided_model
from tests.support.soak.http_load import HttpClients, StreamedRequest, assert_all_right, clear_texts

PREEMPTION: int = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
NEW_TOKENS = 40
NUM_PROMPTS = 6
CANDIDATES = [f"{word} {number}" for number in range(20) for word in ("The tower", "import os", "class Cat")]
CLIENTS = 6
FEW_TOKENS, PAUSE_S = 8, 1.0  # of the one client that asks all the time: far below what two expert actors can do
GRACE_S = 60.0  # of a node that is preempted or gets SIGTERM
LARGE_TEXTS, MANY_TEXTS = 10, 500  # under load on the large cluster, before its node goes
SETTLE_S = 2.0


@dataclass(kw_only=True)
class Cycle:
    """One cycle. Times in seconds since its begin."""

    kind: str
    large_s: float = 0.0  # the node serves
    empty_s: float = 0.0  # no expert is on the node any longer; only if it was drained or terminated
    small_s: float = 0.0  # the node is gone
    late: list[str] = field(default_factory=list)  # what drains could not move in time
    held: dict[str, Footprint] = field(default_factory=dict)  # by each process, afterwards
    shared_folder_bytes: int = 0


class Cycles:
    """Runs cycles, and collects all requests."""

    def __init__(self, running: ServedCluster, prompts: Sequence[str]) -> None:
        self.texts: list[StreamedRequest] = []
        self._running = running
        self._prompts = prompts
        self._first_pids: dict[str, int] = {}

    def run(self, kind: str) -> Cycle:
        cycle, began_s, running = Cycle(kind=kind), time.monotonic(), self._running
        clients = HttpClients(URL, MODEL, self._prompts, number=CLIENTS, new_tokens=NEW_TOKENS)
        with clients:
            running.wait(running.is_large, "the cluster is large")
            cycle.large_s = time.monotonic() - began_s
            self._wait_texts(clients, MANY_TEXTS if kind == "long" else LARGE_TEXTS)
            if kind in ("drained", "terminated"):
                cycle.late = self._remove_node(kind)
                cycle.empty_s = time.monotonic() - began_s
        self.texts += clients.texts
        running.wait(running.is_small, "the cluster is small")
        cycle.small_s = time.monotonic() - began_s
        time.sleep(SETTLE_S)
        cycle.held, cycle.shared_folder_bytes = self._held(), shared_folder_bytes()
        return cycle

    def _wait_texts(self, clients: HttpClients, number: int) -> None:
        """Waits for so many more requests, some at a time: their rate is the machine's."""
        for _ in range(0, number, LARGE_TEXTS):
            enough = partial(_more_than, clients, len(clients.texts) + LARGE_TEXTS - 1)
            self._running.wait(enough, "requests end on the large cluster")

    def _remove_node(self, kind: str) -> list[str]:
        """Announces the end of the worker node, and waits until nothing is left on it; returns what was late."""
        running = self._running
        node = next(iter(running.nodes_of_experts().keys() - {running.head}))
        known = {operation.id for operation in running.operations(OperationKind.DRAIN)}
        if kind == "drained":
            self._move_router_to_worker()
            deadline_ms = int((time.time() + GRACE_S) * 1e3)
            accepted, why = GcsClient(address=GCS_ADDRESS).drain_node(node, PREEMPTION, "a test's", deadline_ms)
            assert accepted, why
        else:
            first_process_of(node).send_signal(signal.SIGTERM)

        def drains() -> list[Any]:
            found = [o for o in running.operations(OperationKind.DRAIN) if o.id not in known]
            return found if found and all(o.phase.ended for o in found) else []

        running.wait(drains, "the node is drained")
        ended = drains()
        assert all(o.phase is OperationPhase.DONE for o in ended), ended
        assert node not in running.nodes_of_experts()
        if kind == "drained":
            running.wait(lambda: self._replaced("router-1"), "the router has left the node")
            with running.calls() as calls:
                calls.scale_routers(1)
        return [o.detail for o in ended if o.detail]

    def _move_router_to_worker(self) -> None:
        """Starts a second router, for which only the worker node has room."""
        running = self._running
        with running.calls() as calls:
            calls.scale_routers(2)
        running.wait(lambda: len([s for s in running.status().router_states if s.address]) == 2, "two routers serve")

    def _replaced(self, router: str) -> bool:
        names = [name for name in self._running.cluster.driver.actors() if is_router(name)]
        return router not in names and len(names) == 2 and not self._running.is_changing()

    def _held(self) -> dict[str, Footprint]:
        """Returns what every process holds. Asserts that they are still the first ones: none was lost."""
        pids = self._running.pids()
        self._first_pids = self._first_pids or pids
        assert pids == self._first_pids, (pids, self._first_pids)
        return footprints(pids)


def _more_than(clients: HttpClients, number: int) -> bool:
    return len(clients.texts) > number


def run(folder: Path, kinds: Sequence[str]) -> None:
    """Runs the cycles, and writes what came of them."""
    model_dir = save_decided_model(folder / "model", num_experts=TINY.num_experts)
    register_native_family()
    whole = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = load_tokenizer(model_dir)
    greedy = clear_texts(whole, tokenizer, CANDIDATES, NEW_TOKENS, NUM_PROMPTS)
    prompts = list(greedy)
    short = clear_texts(whole, tokenizer, prompts, FEW_TOKENS, NUM_PROMPTS)
    cycles: list[Cycle] = []
    with ExitStack() as stack:
        stack.enter_context(
            AutoscaledRay(head_cpus=HEAD_CPUS, worker_cpus=WORKER_CPUS, max_workers=MAX_WORKERS, grace_s=GRACE_S)
        )
        head = ray.get_runtime_context().get_node_id()
        running = stack.enter_context(served(model_dir, folder, head))
        sampled, sampled_short = (_sampled(prompts, tokens) for tokens in (NEW_TOKENS, FEW_TOKENS))
        always = HttpClients(URL, MODEL, prompts, number=1, new_tokens=FEW_TOKENS, pause_s=PAUSE_S)
        several = Cycles(running, prompts)
        with always:
            for kind in kinds:
                cycles.append(several.run(kind))
                print(json.dumps(dataclasses.asdict(cycles[-1])), flush=True)
        assert_all_right(several.texts, greedy, sampled, NEW_TOKENS)
        assert_all_right(always.texts, short, sampled_short, FEW_TOKENS)
    texts = len(several.texts) + len(always.texts)
    found = {"cycles": [dataclasses.asdict(cycle) for cycle in cycles], "texts": texts}
    (folder / "cycles.json").write_text(json.dumps(found))


def _sampled(prompts: Sequence[str], new_tokens: int) -> dict[str, str]:
    """Returns the sampled output of every prompt while nothing changes."""
    load = Load(url=URL, model=MODEL, prompts=prompts, clients=1, new_tokens=new_tokens)
    texts = asyncio.run(ask_once(load))
    assert not any(text.failure for text in texts), texts
    return {text.prompt: text.text for text in texts}


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])

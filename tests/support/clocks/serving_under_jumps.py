"""A whole cluster, a gateway and a client in this process, whose wall clock is set under requests that are under way.

python -m tests.support.clocks.serving_under_jumps MODEL, with the environment of shifted_clock; prints Findings.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import httpx

from moecluster.client import Client
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.metrics_server import MetricsServer
from moecluster.types import OperationKind
from tests.support.clocks.shifted_clock import set_clock
from tests.support.clusters.changing_cluster import changing_clusters
from tests.support.clusters.loopback_cluster import LEASE_S
from tests.support.clusters.running_gateway import running_gateway
from tests.support.models.weight_versions import done
from tests.support.waiting import WAIT_S

JUMPS_S = (3 * 3600, -6 * 3600, 400 * 86400, 0)  # to these times after the machine's, one after the other
PROMPT = "def add(a, b):"
NEW_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was seen before (first) and under all jumps."""

    texts: list[str] = field(default_factory=list)  # of every request, at the router and at the gateway
    set_to_s: list[float] = field(default_factory=list)  # the wall clock after each jump, less the machine's
    leases: list[list[str]] = field(default_factory=list)  # routers that have one
    incarnations: list[list[str]] = field(default_factory=list)  # of the first actors
    unasked: list[str] = field(default_factory=list)  # operations
    took_s: list[float] = field(default_factory=list)  # the operations that were asked for, by their dates
    bound_s: list[float] = field(default_factory=list)  # that they cannot have taken longer


class Served:
    """The cluster and its clients."""

    def __init__(self, model: str, running: ExitStack) -> None:
        start = running.enter_context(changing_clusters(model))
        self.cluster = start(2, policy="static")
        self.gateway = running.enter_context(running_gateway([self.cluster.router_server.address]))
        metrics = running.enter_context(closing(MetricsServer(self.cluster.metrics, credentials=None)))
        self.client = running.enter_context(Client(self.cluster.router_server.address))
        self.calls = running.enter_context(ControllerCalls(self.cluster.controller_server.address))
        self.pages = [f"http://127.0.0.1:{metrics.port}/metrics", f"{self.gateway.url}/metrics"]

    def streamed(self) -> Iterator[str]:
        """The text of one request at the gateway, as it comes."""
        asked = {"model": "model", "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{self.gateway.url}/v1/completions", json=asked, timeout=WAIT_S) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]

    def generated(self) -> str:
        """The text of one request at the router."""
        return self.client.generate(PROMPT, max_new_tokens=NEW_TOKENS).text()

    def note(self, found: Findings) -> None:
        """Adds what is to be seen now."""
        found.texts.extend((self.generated(), "".join(self.streamed())))
        for page in self.pages:
            httpx.get(page, timeout=WAIT_S).raise_for_status()
        status = self.calls.status()
        found.leases.append([state.router for state in status.router_states])
        found.incarnations.append(sorted(a.incarnation for a in status.actors if a.actor in ("expert-0", "expert-1")))

    def jump(self, to_s: int, found: Findings) -> None:
        """Sets the clock in the middle of requests and of an operation, and uses the cluster for several leases."""
        at_router = (chunk.text for chunk in self.client.generate(PROMPT, max_new_tokens=NEW_TOKENS))
        at_gateway = self.streamed()
        begun = next(at_router), next(at_gateway)
        begun_s = time.monotonic()
        asked = self.calls.scale(3 if len(self.cluster.services) == 2 else 2)
        set_clock(to_s)
        found.texts.extend((begun[0] + "".join(at_router), begun[1] + "".join(at_gateway)))
        ended = done(self.cluster, asked)
        assert ended.ended_s is not None
        found.took_s.append(ended.ended_s - ended.created_s)
        found.bound_s.append(time.monotonic() - begun_s)
        end_s = time.monotonic() + 3 * LEASE_S  # whatever counts by the wall clock would be over by then
        while time.monotonic() < end_s:
            found.texts.append(self.generated())


def main() -> None:
    """Prints the findings, as JSON in the last line."""
    found = Findings()
    with ExitStack() as running:
        served = Served(sys.argv[1], running)
        served.note(found)
        shift_s = time.time() - time.monotonic()
        for to_s in JUMPS_S:
            served.jump(to_s, found)
            found.set_to_s.append(time.time() - time.monotonic() - shift_s)
            served.note(found)
        found.unasked.extend(o.id for o in served.calls.operations() if o.kind is not OperationKind.SCALE)
    print(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()

"""One of every server of the product in a process of its own, which does as it is told.

python -m tests.support.exhaustion.every_server MODEL TLS_DIR: prints its addresses as JSON, then answers each line of
its standard input ("exhaust", "free", "threads", "generate") with a line.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecluster.client import Client
from moecluster.metrics import Metrics
from moecluster.rpc.checkpoint.server import Announcements, serve_checkpoints
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.metrics_server import MetricsServer
from tests.support.clusters.changing_cluster import changing_clusters
from tests.support.clusters.running_gateway import running_gateway
from tests.support.exhaustion.descriptors import no_descriptors
from tests.support.in_child import ROOT

SECRET = "k" * 43
PROMPT = "def add(a, b):"
NEW_TOKENS = 8
GRPC = ("expert", "router", "controller", "checkpoint")
HTTP = ("metrics", "https metrics", "gateway", "https gateway")


@dataclass(frozen=True, kw_only=True)
class Child:
    """The process, and where its servers are."""

    process: "subprocess.Popen[str]"
    addresses: dict[str, str]  # one of GRPC or HTTP -> host:port

    def tell(self, word: str) -> Any:
        """Returns its answer to one word."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def every_server(model: str, tls_dir: Path) -> Iterator[Child]:
    """Context: the process runs."""
    command = [sys.executable, "-m", "tests.support.exhaustion.every_server", model, str(tls_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Child(process=process, addresses=json.loads(process.stdout.readline()))
        finally:
            process.kill()


def main() -> None:
    """Serves until its standard input ends."""
    model, tls_dir = sys.argv[1:]
    secret = ClusterCredentials(secret=SECRET, tls_dir=tls_dir)
    files: dict[str, Any] = {"tls_certificate_file": f"{tls_dir}/tls.crt", "tls_key_file": f"{tls_dir}/tls.key"}
    with ExitStack() as running:
        cluster = running.enter_context(changing_clusters(model))(2, policy="static")
        checkpoints = serve_checkpoints(Announcements(), credentials=None)
        running.callback(checkpoints.stop, 0.0)
        plain = running.enter_context(closing(MetricsServer(Metrics(model="m"), credentials=None)))
        secured = running.enter_context(closing(MetricsServer(Metrics(model="m"), credentials=secret, is_open=True)))
        gateways = [
            running.enter_context(running_gateway([cluster.router_server.address], **options))
            for options in ({}, files)
        ]
        client = running.enter_context(Client(cluster.router_server.address))
        servers = (cluster.servers["expert-0"], cluster.router_server, cluster.controller_server, checkpoints)
        addresses = dict(zip(GRPC, (server.address for server in servers), strict=True))
        https = (plain.address, secured.address, gateways[0].server.address, gateways[1].server.address)
        print(json.dumps(addresses | dict(zip(HTTP, https, strict=True))), flush=True)
        exhausted = ExitStack()
        for line in sys.stdin:
            answer: Any = None
            match line.strip():
                case "exhaust":
                    exhausted.enter_context(no_descriptors())
                case "free":
                    exhausted.close()
                case "threads":
                    answer = sorted(t.name for t in threading.enumerate() if t.name[0].islower())
                case "generate":
                    answer = client.generate(PROMPT, max_new_tokens=NEW_TOKENS).text()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

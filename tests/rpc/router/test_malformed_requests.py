"""Malformed generation requests over real gRPC get a clear status, and other requests are unaffected."""

import os
from typing import Any

import grpc
import pytest

from moecluster.client import Client
from moecluster.rpc.server import open_channel
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.malformed.malformed_requests import malformed_requests

COUNT = int(os.environ.get("MOECLUSTER_MALFORMED_COUNT", "480"))
GOOD_EVERY = 60
METHOD = "/moecluster.v1.RouterService/Generate"
REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
UNREADABLE = grpc.StatusCode.INTERNAL  # gRPC's own status for bytes that it cannot parse


@pytest.mark.timeout(600)
def test_every_malformed_request_is_refused_and_good_ones_between_are_the_same(cluster: LoopbackCluster) -> None:
    with open_channel(cluster.router_server.address) as channel, Client(cluster.router_server.address) as client:
        send: Any = channel.unary_stream(METHOD)  # bytes as they are
        expected = client.generate("import", max_new_tokens=4).text()
        for number, (wrong, message) in enumerate(malformed_requests(COUNT)):
            with pytest.raises(grpc.RpcError) as caught:
                list(send(message, timeout=20.0))
                pytest.fail(f"{wrong} was taken: {message[:80]!r}")
            code, detail = caught.value.code(), caught.value.details()
            if wrong == "raw_bytes":
                assert code in (UNREADABLE, *REFUSED), (wrong, code, detail)
            else:
                assert code in REFUSED, (wrong, code, detail)
                assert detail and ":" in detail and "Traceback" not in detail, (wrong, detail)
            if number % GOOD_EVERY == 0:
                assert client.generate("import", max_new_tokens=4).text() == expected
        assert (cluster.router.status().running, cluster.router.status().waiting) == (0, 0)

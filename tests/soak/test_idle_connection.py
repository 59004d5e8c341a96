"""A connection on which nothing is said for a while stays up: keepalive pings are no abuse to our servers."""

import time

import grpc

from moecluster.expert.service import ExpertService
from moecluster.proto import expert_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.server import KEEPALIVE_S, open_channel
from tests.support.clusters.given import any_directory

PINGS = 4.5  # more than a server forgives


def test_a_connection_without_calls_stays_up() -> None:
    service = ExpertService(is_given=any_directory, name="idle")
    server = serve_expert(service, credentials=None)
    seen: list[grpc.ChannelConnectivity] = []
    try:
        with open_channel(server.address) as channel:
            ExpertServiceStub(channel).Status(expert_pb2.StatusRequest(), timeout=10)
            channel.subscribe(seen.append)
            time.sleep(PINGS * KEEPALIVE_S)
    finally:
        server.stop(0.0)
        service.close()
    assert set(seen) == {grpc.ChannelConnectivity.READY}

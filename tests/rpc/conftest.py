"""One expert actor behind loopback gRPC, and connections to it."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from torch import nn

from moecluster.expert.service import ExpertService
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.server import RunningServer
from tests.support.expert.small_actor import Connect, load_modules, open_stream, save_small_model, served, serving
from tests.support.fakes.raw_stream import RawStream


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small-model"))


@pytest.fixture(scope="session")
def modules(checkpoint: Path) -> dict[int, nn.Module]:
    """The experts in this process, by index."""
    return load_modules(checkpoint)


@pytest.fixture
def service(checkpoint: Path) -> Iterator[ExpertService]:
    with serving(checkpoint) as service:
        yield service


@pytest.fixture
def server(service: ExpertService) -> Iterator[RunningServer]:
    with served(service) as server:
        yield server


@pytest.fixture
def connect(server: RunningServer) -> Iterator[Connect]:
    """open_stream to the served actor; closed at the end."""
    with ExitStack() as opened:

        def connect(*args: Any, **options: Any) -> GrpcExpertTransport:
            transport = open_stream(server.address, *args, **options)
            opened.callback(transport.close)
            return transport

        yield connect


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    """A channel without the project's limits and keepalive."""
    with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> ExpertServiceStub:
    return ExpertServiceStub(channel)


@pytest.fixture
def stream(stub: ExpertServiceStub) -> Iterator[RawStream]:
    stream = RawStream(stub)
    yield stream
    stream.close()

"""gRPC over mutual TLS: without a certificate of the cluster's CA nobody connects; certificates rotate under calls."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moecluster.cli.common.certificates import Authority
from moecluster.client import Client
from moecluster.errors import ConfigError, Unavailable
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.credentials import TLS_DIR_VARIABLE, ClusterCredentials, write_secret
from moecluster.rpc.health import HealthWatch
from moecluster.rpc.server import RunningServer, open_async_channel, open_channel, start_server
from tests.support.certificates import write_certificates
from tests.support.clusters.guarded_servers import guarded_servers
from tests.support.fakes.fake_router import FakeRouter
from tests.support.waiting import wait_until

SECRET = "k" * 43
OURS, THEIRS = Authority.make(), Authority.make()
TIMEOUT_S = 60.0


def with_tls(folder: Path | str) -> ClusterCredentials:
    return ClusterCredentials(secret=SECRET, tls_dir=str(folder))


def check(channel: Any) -> Any:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)


def refusal(channel: grpc.Channel) -> str:
    with channel, pytest.raises(grpc.RpcError) as caught:
        check(channel)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE, error
    return str(error.details())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_certificates(tmp_path / "tls", OURS)


@pytest.fixture
def server(folder: Path) -> Iterator[RunningServer]:
    server = start_server("test", lambda server: None, credentials=with_tls(folder))
    yield server
    server.stop(0.0)


def test_every_server_speaks_mutual_tls_alone(folder: Path, tmp_path: Path) -> None:
    foreign = write_certificates(tmp_path / "foreign", THEIRS)
    stolen_ca = grpc.ssl_channel_credentials((folder / "ca.crt").read_bytes())
    name = [("grpc.ssl_target_name_override", "moecluster")]
    with guarded_servers(with_tls(folder)) as servers:
        for server in servers.values():
            with open_channel(server.address, with_tls(folder)) as channel:
                assert check(channel).status == health_pb2.HealthCheckResponse.SERVING
            refusal(open_channel(server.address, ClusterCredentials(secret=SECRET)))
            refusal(open_channel(server.address))
            refusal(open_channel(server.address, with_tls(foreign)))
            refusal(grpc.secure_channel(server.address, stolen_ca, options=name))
            certificate, key = ((foreign / file).read_bytes() for file in ("tls.crt", "tls.key"))
            of_another_ca = grpc.ssl_channel_credentials((folder / "ca.crt").read_bytes(), key, certificate)
            refusal(grpc.secure_channel(server.address, of_another_ca, options=name))


def test_a_client_believes_no_server_of_another_ca_and_none_in_plain_text(folder: Path, tmp_path: Path) -> None:
    for credentials in (with_tls(write_certificates(tmp_path / "theirs", THEIRS)), ClusterCredentials(secret=SECRET)):
        impostor = start_server("test", lambda server: None, credentials=credentials)
        try:
            refusal(open_channel(impostor.address, with_tls(folder)))
        finally:
            impostor.stop(0.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "meaning"),
    [
        ("", "tls", r"does it require TLS \(security\.tls_dir\)"),
        ("tls", "", "it speaks plain text, and TLS was asked for"),
        ("foreign", "tls", "its certificate is not of the CA in the folder of certificates here"),
    ],
)
def test_a_client_is_told_what_does_not_fit(folder: Path, tmp_path: Path, ours, theirs, meaning) -> None:
    write_certificates(tmp_path / "foreign", THEIRS)
    server = start_server("x", lambda server: None, credentials=with_tls(theirs and tmp_path / theirs))
    try:
        with (
            ControllerCalls(server.address, credentials=with_tls(ours and tmp_path / ours)) as calls,
            pytest.raises(Unavailable, match=meaning),
        ):
            calls.status()
    finally:
        server.stop(0.0)


def test_clients_take_the_folder_as_an_argument_or_from_the_environment(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "own" / "cluster.secret"
    write_secret(file, ClusterCredentials(secret=SECRET))
    with FakeRouter(credentials=with_tls(folder)) as router:
        with Client(router.address, secret_file=file, tls_dir=folder) as client:
            assert client.generate("a").text()
        monkeypatch.setenv(TLS_DIR_VARIABLE, str(folder))
        with Client(router.address, secret_file=file) as client:
            assert client.generate("a").text()
        monkeypatch.setenv(TLS_DIR_VARIABLE, str(tmp_path / "none"))
        with (
            pytest.raises(ConfigError, match=r"none/tls\.crt: cannot be read"),
            Client(router.address, secret_file=file) as client,
        ):
            client.generate("a").text()


def serial(address: str) -> bytes:
    """The certificate that a new connection is shown. TLS 1.3 shows it before it asks for the client's."""
    import socket
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with context.wrap_socket(socket.create_connection((host, int(port)), TIMEOUT_S)) as connected:
        return connected.getpeercert(binary_form=True) or b""


def test_certificates_rotate_under_running_streams_and_new_calls(server: RunningServer, folder: Path) -> None:
    lost = threading.Event()
    with open_channel(server.address, with_tls(folder)) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
        next(watch)
        watching = HealthWatch(server.address, lost.set, credentials=with_tls(folder))
        shown = {serial(server.address)}
        for _ in range(3):
            write_certificates(folder, OURS)
            wait_until(lambda: check(channel) and serial(server.address) not in shown, "the new certificate")
            shown.add(serial(server.address))
        assert watch.is_active() and not lost.is_set()
        watch.cancel()
        watching.close()


def test_the_ca_itself_rotates_by_way_of_both(server: RunningServer, folder: Path) -> None:
    both = OURS.pem[0] + THEIRS.pem[0]
    with open_channel(server.address, with_tls(folder)) as channel:
        before = serial(server.address)
        for authority, trusts in ((OURS, both), (THEIRS, both), (THEIRS, THEIRS.pem[0])):
            write_certificates(folder, authority, trusts=trusts)
            wait_until(lambda: serial(server.address) != before, "the new certificate")  # noqa: B023
            before = serial(server.address)
            with open_channel(server.address, with_tls(folder)) as other:
                assert check(channel) and check(other)
        old = grpc.ssl_channel_credentials(THEIRS.pem[0], *reversed(OURS.certify(days=1)))
        refusal(grpc.secure_channel(server.address, old, options=[("grpc.ssl_target_name_override", "moecluster")]))


def older_connections(channel: Any) -> int:
    return len(channel._channel._older)


def rotated(channel: Any, folder: Path, call: Callable[[], Any]) -> None:
    """Rotates until the channel has opened a new connection."""
    before = channel._channel._newest
    write_certificates(folder, OURS)
    wait_until(lambda: call() and channel._channel._newest is not before, "a new connection")


def test_an_old_connection_lives_as_long_as_its_calls(server: RunningServer, folder: Path) -> None:
    with open_channel(server.address, with_tls(folder)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        rotated(channel, folder, lambda: check(channel))
        assert older_connections(channel) == 0, "one without calls is closed at once"
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        assert all(next(watch) for watch in watches)
        rotated(channel, folder, lambda: check(channel))
        assert older_connections(channel) == 1
        watches[0].cancel()
        assert watches[1].is_active()
        watches[1].cancel()
        wait_until(lambda: older_connections(channel) == 0, "the old connection's end")
        future = stub.Check.future(health_pb2.HealthCheckRequest())
        assert future.result(TIMEOUT_S) and stub.Check.with_call(health_pb2.HealthCheckRequest())[0]
        grpc.channel_ready_future(channel).result(TIMEOUT_S)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        next(watch)
        rotated(channel, folder, lambda: check(channel))
    with pytest.raises(grpc.RpcError):
        next(watch)
    with pytest.raises(ValueError, match="closed"):
        check(channel)


def test_the_same_on_an_event_loop(server: RunningServer, folder: Path) -> None:
    async def run() -> None:
        async with open_async_channel(server.address, with_tls(folder)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            await channel.channel_ready()
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            before: Any = channel._channel._newest  # type: ignore[attr-defined]
            write_certificates(folder, OURS)
            async with asyncio.timeout(TIMEOUT_S):
                while channel._channel._newest is before:  # type: ignore[attr-defined]
                    assert (await stub.Check(health_pb2.HealthCheckRequest())).status
                    await asyncio.sleep(0.01)
                assert older_connections(channel) == 1 and not watch.done()
                watch.cancel()
                while older_connections(channel):
                    await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match="closed"):
            stub.Check(health_pb2.HealthCheckRequest())

    asyncio.run(run())


def test_a_server_does_not_start_with_certificates_that_do_not_fit(folder: Path) -> None:
    (folder / "tls.key").write_bytes(OURS.pem[1])
    with pytest.raises(ConfigError, match="is not the key of"):
        start_server("test", lambda server: None, credentials=with_tls(folder))
    with pytest.raises(ConfigError, match="is not the key of"):
        open_channel("127.0.0.1:1", with_tls(folder))

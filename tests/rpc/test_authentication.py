"""Calls without the cluster's secret are refused; with it everything works as before."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import moecluster.proto
from moecluster.client import AsyncClient, Client, ClusterCredentials
from moecluster.errors import ConfigError, Unauthenticated, Unavailable
from moecluster.proto import expert_pb2, expert_pb2_grpc
from moecluster.rpc.authentication import MAX_ANONYMOUS_CALLS
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.controller.subscription import ControllerClient
from moecluster.rpc.credentials import SECRET_FILE_VARIABLE, write_secret
from moecluster.rpc.health import HealthWatch
from moecluster.rpc.server import RunningServer, open_async_channel, open_channel
from moecluster.types import Placement
from tests.support.clusters.every_method import OURS, Metadata, Method, code_of, guarded_methods, health_methods
from tests.support.clusters.guarded_servers import guarded_servers
from tests.support.fakes.fake_controller import FakeController
from tests.support.fakes.fake_router import FakeRouter

CREDENTIALS = ClusterCredentials(secret="k" * 43)
SERVERS = ("expert", "router", "controller", "checkpoint")
WITHOUT: dict[str, Metadata] = {
    "nothing": (),
    "empty": (("authorization", ""),),
    "another secret": (("authorization", f"Bearer {'w' * 43}"),),
    "one character short": (("authorization", f"Bearer {'k' * 42}"),),
    "one character more": (("authorization", f"Bearer {'k' * 44}"),),
    "one character wrong": (("authorization", f"Bearer {'k' * 42}K"),),
    "no scheme": (("authorization", "k" * 43),),
    "another scheme": (("authorization", f"Basic {'k' * 43}"),),
    "a space more": (("authorization", f"Bearer  {'k' * 43}"),),
    "two, one of them right": (("authorization", f"Bearer {'w' * 43}"), ("authorization", f"Bearer {'k' * 43}")),
    "another key": (("x-authorization", f"Bearer {'k' * 43}"),),
}


@pytest.fixture(scope="module")
def guarded() -> Iterator[dict[str, RunningServer]]:
    with guarded_servers(CREDENTIALS) as servers:
        yield servers


@pytest.mark.parametrize("attempt", WITHOUT)
@pytest.mark.parametrize("server", SERVERS)
def test_every_method_of_every_server_is_refused(guarded, server: str, attempt: str) -> None:
    """Also methods that do not exist: callers without the secret cannot learn which methods exist."""
    with open_channel(guarded[server].address) as channel:
        for method in [*guarded_methods(), Method(path="/no.such.Service/Method", requests_streamed=False)]:
            code, detail = code_of(channel, method, WITHOUT[attempt])
            assert code is grpc.StatusCode.UNAUTHENTICATED, (method.path, code, detail)
            assert detail.startswith("authorization: ") and "\n" not in detail and "secret_file=" in detail
            assert "k" * 40 not in detail


def test_the_table_has_every_method_of_every_proto() -> None:
    """A new proto file, service or method is either in the table automatically, or fails here."""
    protos = Path(moecluster.proto.__file__).parents[2] / "protos"
    declared = {
        line.split()[1].partition("(")[0]
        for file in protos.rglob("*.proto")
        for line in file.read_text().splitlines()
        if line.strip().startswith("rpc ")
    }
    assert declared == {m.path.rpartition("/")[2] for m in guarded_methods()} - {"ServerReflectionInfo"}
    assert len(declared) > 25
    generated = {file.stem for file in Path(moecluster.proto.__file__).parent.glob("*_pb2_grpc.py")}
    with_services = {m.DESCRIPTOR.name.rpartition("/")[2].removesuffix(".proto") for m in OURS}
    assert with_services == {
        name.removesuffix("_pb2_grpc")
        for name in generated
        if "Servicer" in (Path(moecluster.proto.__file__).parent / f"{name}.py").read_text()
    }


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("attempt", ["nothing", "another secret"])
def test_health_alone_answers_anybody(guarded, server: str, attempt: str) -> None:
    with open_channel(guarded[server].address) as channel:
        answers = {m.path.rpartition("/")[2]: code_of(channel, m, WITHOUT[attempt])[0] for m in health_methods()}
        assert answers["Check"] is answers["Watch"] is grpc.StatusCode.OK
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_answers_with_the_secret(guarded) -> None:
    reflection = next(m for m in guarded_methods() if "reflection" in m.path)
    with open_channel(guarded["router"].address, CREDENTIALS) as channel:
        assert code_of(channel, reflection)[0] is grpc.StatusCode.OK


def test_a_call_is_refused_before_its_body_has_come(guarded) -> None:
    """A caller that sends only headers occupies no server thread."""
    with open_channel(guarded["expert"].address) as channel:
        never = threading.Event()

        def body() -> Iterator[bytes]:
            never.wait()
            yield b""

        load: Any = channel.stream_unary("/moecluster.v1.ExpertService/Load")
        calls = [load.future(body()) for _ in range(200)]
        try:
            codes = {call.code() for call in calls}
        finally:
            never.set()
        assert codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert grpc.StatusCode.UNAUTHENTICATED in codes


def test_health_calls_without_the_secret_leave_room_for_those_with_it() -> None:
    """A server runs 128 calls at once; callers without the secret get only a few of them, even if they never end."""
    with closing(_Serving(FakeController())) as serving, open_channel(serving.address) as anonymous:
        stub: Any = health_pb2_grpc.HealthStub(anonymous)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(200)]
        outcomes = [_first(watch) for watch in watches]
        assert outcomes.count("answered") == MAX_ANONYMOUS_CALLS
        assert outcomes.count("RESOURCE_EXHAUSTED") == 200 - MAX_ANONYMOUS_CALLS
        with ControllerCalls(serving.address, credentials=CREDENTIALS) as calls:
            assert calls.status().term >= 0
        lost = threading.Event()
        with closing(HealthWatch(serving.address, lost.set, credentials=CREDENTIALS)):
            assert not lost.wait(0.2)
        for watch in watches:
            watch.cancel()


def _first(watch: Any) -> str:
    try:
        next(watch)
        return "answered"
    except grpc.RpcError as exc:
        return str(exc.code().name)


class _Serving:
    """A controller's server with the secret."""

    def __init__(self, controller: FakeController) -> None:
        self._server = serve_controller(controller, credentials=CREDENTIALS)
        self.address = self._server.address

    def close(self) -> None:
        self._server.stop(0.0)


def test_with_the_secret_calls_streams_and_watches_work() -> None:
    controller = FakeController()
    with ExitStack() as stack:
        serving = stack.enter_context(closing(_Serving(controller)))
        with ControllerCalls(serving.address, credentials=CREDENTIALS) as calls:
            calls.set_checkpoint("/runs/step-100")
        client = ControllerClient(router="router-0", resolve=lambda: serving.address, credentials=CREDENTIALS)
        stack.callback(client.close)
        controller.publish(Placement(term=1, generation=1, layer_experts={0: 1}, actors={}, replicas=()))
        assert client.current(20.0).number == (1, 1)


@pytest.mark.parametrize("given", [None, ClusterCredentials(secret="w" * 43)])
def test_a_client_with_the_wrong_secret_is_told_what_would_be_right(guarded, given, monkeypatch) -> None:
    monkeypatch.delenv(SECRET_FILE_VARIABLE, raising=False)
    address = guarded["router"].address
    with Client(address, credentials=given) as client, pytest.raises(Unauthenticated, match="secret_file="):
        client.generate("a").text()
    with (
        ControllerCalls(guarded["controller"].address, credentials=given) as calls,
        pytest.raises(Unavailable) as caught,
    ):
        calls.status()
    assert isinstance(caught.value, Unauthenticated) and "w" * 40 not in str(caught.value)

    async def ask() -> None:
        async with AsyncClient(address, credentials=given) as client:
            with pytest.raises(Unauthenticated, match="secret_file="):
                await client.generate("a").text()

    asyncio.run(ask())


def test_a_client_takes_the_secret_from_a_file_or_the_environment(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "one" / "cluster.secret"
    write_secret(file, CREDENTIALS)
    with FakeRouter(credentials=CREDENTIALS) as router:
        with Client(router.address, secret_file=file) as client:
            assert client.generate("a").text()
        monkeypatch.setenv(SECRET_FILE_VARIABLE, str(file))
        with Client(router.address) as client:
            assert client.generate("a").text()

        async def ask() -> str:
            async with AsyncClient(router.address) as client:
                return await client.generate("a").text()

        assert asyncio.run(ask())
        monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / "none"))
        with pytest.raises(ConfigError, match=r"none: the cluster secret cannot be read \(No such file"):
            Client(router.address)


def test_a_future_and_an_event_loop_send_it_too(guarded) -> None:
    """Calls a method that the handler itself refuses, which shows that it was reached."""
    request = expert_pb2.LoadRequest(timeout_s=-1.0)
    with open_channel(guarded["expert"].address, CREDENTIALS) as channel:
        call = expert_pb2_grpc.ExpertServiceStub(channel).Load.future(request)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            expert_pb2_grpc.ExpertServiceStub(channel).Load.with_call(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    async def ask(credentials: ClusterCredentials | None) -> grpc.StatusCode:
        async with open_async_channel(guarded["expert"].address, credentials) as channel:
            stub: Any = expert_pb2_grpc.ExpertServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Load(request)
            return caught.value.code()

    assert asyncio.run(ask(CREDENTIALS)) is grpc.StatusCode.INVALID_ARGUMENT
    assert asyncio.run(ask(None)) is grpc.StatusCode.UNAUTHENTICATED

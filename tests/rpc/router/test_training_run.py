"""A training run is begun, followed and stopped over gRPC, wherever the first router is."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import pytest

from moecluster.errors import InvalidMessage, MoeClusterError, StateLost, Unavailable, UserError
from moecluster.proto import router_pb2
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc.router.client import RouterCalls
from moecluster.rpc.router.server import serve_router
from moecluster.rpc.router.training_messages import (
    MAX_EVENTS,
    MAX_SETTINGS_CHARACTERS,
    RunGone,
    RunProgress,
    StartRequest,
    decode_progress,
    encode_progress,
)
from moecluster.rpc.router.training_run import TrainingRun
from moecluster.rpc.server import RunningServer, open_channel
from tests.support.fakes.fake_router import FakeRouter

TOO_MANY = MAX_SETTINGS_CHARACTERS + 1


@dataclass
class FakeHost:
    """A TrainingHandler that records what is asked."""

    runs: list[StartRequest] = field(default_factory=list)
    events: tuple[str, ...] = ()
    ended: bool = False
    error: MoeClusterError | None = None
    stopped: list[str] = field(default_factory=list)

    def start(self, request: StartRequest) -> None:
        if "train" not in request.settings:
            raise UserError("train: missing")
        self.runs.append(request)

    def progress(self, run_id: str, since: int) -> RunProgress:
        if not self.runs or self.runs[-1].run_id != run_id:
            raise StateLost("its training run is gone")
        return RunProgress(events=self.events[since:], ended=self.ended, error=self.error)

    def stop(self, run_id: str) -> None:
        self.stopped.append(run_id)


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with FakeRouter() as running:
        yield running


@pytest.fixture
def server(router: FakeRouter, host: FakeHost) -> Iterator[RunningServer]:
    running = serve_router(router, host, credentials=None)
    yield running
    running.stop(0.0)


def run_at(server: RunningServer) -> TrainingRun:
    return TrainingRun(find_first=lambda: server.address, find_all=lambda: (server.address,), credentials=None)


def test_a_run_is_begun_followed_and_stopped(server: RunningServer, host: FakeHost, router: FakeRouter) -> None:
    run = run_at(server)
    settings = {"train": {"steps": 3, "data": "stdlib", "betas": [0.9, 0.95]}}
    run.start(settings, "/models/start")
    (begun,) = host.runs
    assert (begun.settings, begun.start) == (settings, "/models/start")
    host.events = ('{"event": "Started"}', "second")
    assert run.progress(0) == RunProgress(events=host.events, ended=False)
    assert run.progress(1).events == ("second",)
    run.stop()
    assert host.stopped == [begun.run_id]
    host.ended = True
    assert run.progress(2) == RunProgress(events=(), ended=True)
    run.reload("/models/end")
    assert router.reloaded == "/models/end"
    run.start(settings, "")
    assert host.runs[1].run_id != begun.run_id and host.runs[1].start == ""
    run.close()


@pytest.mark.parametrize("error", [UserError("wrong"), StateLost("lost"), MoeClusterError("else"), Unavailable("away")])
def test_why_a_run_failed_comes_over(server: RunningServer, host: FakeHost, error: MoeClusterError) -> None:
    run = run_at(server)
    run.start({"train": {}}, "")
    host.ended, host.error = True, error
    found = run.progress(0).error
    kind = MoeClusterError if isinstance(error, Unavailable) else type(error)  # the router itself is well
    assert type(found) is kind and str(found) == str(error)


def test_more_events_than_fit_come_in_turns_and_the_last_ones_end_it() -> None:
    whole = RunProgress(events=tuple(map(str, range(MAX_EVENTS + 1))), ended=True, error=UserError("wrong"))
    first = decode_progress(encode_progress(whole))
    assert first == RunProgress(events=whole.events[:MAX_EVENTS], ended=False)
    rest = decode_progress(
        encode_progress(RunProgress(events=whole.events[MAX_EVENTS:], ended=True, error=whole.error))
    )
    assert rest.events == (str(MAX_EVENTS),) and rest.ended and isinstance(rest.error, UserError)
    with pytest.raises(InvalidMessage, match=r"failure\.kind: 'odd', expected one of user, state-lost, other"):
        decode_progress(router_pb2.TrainingProgress(failure=router_pb2.TrainingFailure(kind="odd")))


def test_a_router_that_moved_is_found_and_says_that_the_run_is_gone(
    router: FakeRouter, server: RunningServer, host: FakeHost
) -> None:
    address = [server.address]
    run = TrainingRun(find_first=lambda: address[0], find_all=lambda: address, credentials=None)
    run.start({"train": {}}, "")
    server.stop(0.0)
    successor = serve_router(router, FakeHost(), credentials=None)
    with pytest.raises(Unavailable):
        run.progress(0)
    address[0] = successor.address
    with pytest.raises(RunGone, match="its training run is gone"):
        run.progress(0)
    run.close()
    successor.stop(0.0)


def test_a_router_that_trains_nothing_says_so(router: FakeRouter) -> None:
    with RouterCalls(router.address) as calls, pytest.raises(UserError, match="this router trains nothing"):
        calls.start_training(StartRequest(run_id="a", settings={}))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (router_pb2.StartTrainingRequest(settings_json="{}"), "run_id"),
        (router_pb2.StartTrainingRequest(run_id="a\n", settings_json="{}"), "run_id"),
        (router_pb2.StartTrainingRequest(run_id="a", settings_json=""), "settings_json"),
        (router_pb2.StartTrainingRequest(run_id="a", settings_json="[1]"), "settings_json"),
        (router_pb2.StartTrainingRequest(run_id="a", settings_json='{"a": NaN}'), "settings_json"),
        (
            router_pb2.StartTrainingRequest(run_id="a", settings_json=" " * (MAX_SETTINGS_CHARACTERS + 1)),
            "settings_json",
        ),
        (router_pb2.StartTrainingRequest(run_id="a", settings_json="{}", start="\0"), "start"),
    ],
)
def test_what_is_malformed_is_refused_by_name(
    server: RunningServer, host: FakeHost, request_: router_pb2.StartTrainingRequest, field: str
) -> None:
    with open_channel(server.address) as channel, pytest.raises(grpc.RpcError) as refused:
        RouterServiceStub(channel).StartTraining(request_, timeout=60.0)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.value.details() or "").startswith(f"{field}: ") and host.runs == []

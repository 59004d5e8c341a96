import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from moecluster.errors import DeadlineExceeded, InvalidMessage, Unavailable, UserError
from moecluster.proto import controller_pb2, tensor_pb2
from moecluster.proto.controller_pb2_grpc import ControllerServiceStub
from moecluster.rpc.controller.client import controller_status, set_checkpoint
from moecluster.rpc.controller.placement_messages import decode_placement, encode_placement
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.controller.subscription import STATE_PERIOD_S, WANT_AGAIN_S, ControllerClient
from moecluster.rpc.server import RunningServer, open_channel
from moecluster.types import (
    NO_PLACEMENT,
    ActorAddress,
    ExpertId,
    LoadSnapshot,
    Placement,
    PlacementNumber,
    Replica,
    RouterState,
)
from tests.support.fakes.fake_controller import FakeController
from tests.support.waiting import WAIT_S, wait_until


def placement(term: int, generation: int) -> Placement:
    address = ActorAddress(actor="expert-0", address="127.0.0.1:5000", incarnation="a1")
    replicas = tuple(Replica(expert=ExpertId(layer=3, index=i), actor="expert-0") for i in range(2))
    return Placement(
        term=term, generation=generation, layer_experts={3: 2}, actors={"expert-0": address}, replicas=replicas
    )


@pytest.fixture
def board() -> FakeController:
    return FakeController()


@pytest.fixture
def server(board: FakeController) -> Iterator[RunningServer]:
    running = serve_controller(board, credentials=None)
    yield running
    board.close()
    running.stop(0.0)


@pytest.fixture
def client(server: RunningServer) -> Iterator[ControllerClient]:
    watching = ControllerClient(router="router-0", resolve=lambda: server.address)
    yield watching
    watching.close()


def test_placements_arrive_whole_and_in_order(board, client) -> None:
    board.publish(placement(1, 1))
    assert client.current(WAIT_S) == placement(1, 1)
    board.publish(placement(1, 2))
    assert client.newer_than(PlacementNumber(1, 1), WAIT_S) == placement(1, 2)
    assert client.newer_than(PlacementNumber(1, 2), 0.05) is None


def test_a_router_renews_its_lease_and_says_what_it_applied(board, client) -> None:
    board.publish(placement(1, 7))
    wait_until(lambda: ("router-0", (1, 7), False) in board.renewals)
    before = len(board.renewals)
    wait_until(lambda: len(board.renewals) >= before + 3)


def test_a_router_tells_its_state_with_every_renewal_and_at_once_when_it_has_changed(board, server) -> None:
    state = [RouterState(router="router-0")]
    board.lease_s = 60.0  # so that no renewal is due
    board.publish(placement(1, 1))
    client = ControllerClient(router="router-0", resolve=lambda: server.address, state=lambda: state[0])
    assert client.current(WAIT_S).number == (1, 1)
    wait_until(lambda: ("router-0", (1, 1), False) in board.renewals)
    renewals = len(board.renewals)
    time.sleep(2 * STATE_PERIOD_S)
    assert len(board.renewals) == renewals, "nothing new is to be said"
    state[0] = RouterState(router="router-0", address="127.0.0.1:7", running=3, waiting=2, weight_version=4)
    began_s = time.monotonic()
    wait_until(lambda: board.states == {"router-0": state[0]})
    assert time.monotonic() - began_s < 1.0
    assert controller_status(server.address).router_states == (state[0],)
    client.close()


def test_a_client_without_a_state_of_its_own_tells_its_name(board, client) -> None:
    wait_until(lambda: board.states == {"router-0": RouterState(router="router-0")})


def test_a_client_knows_where_its_controller_is_as_long_as_it_is_there(board, server, client) -> None:
    assert client.controller == ""
    board.publish(placement(1, 1))
    wait_until(lambda: client.controller == server.address)
    server.stop(0.0)
    wait_until(lambda: client.controller == "")


@pytest.mark.parametrize(
    ("state", "field"),
    [
        (controller_pb2.RouterState(), "state.router"),
        (controller_pb2.RouterState(router="another"), "state.router"),
        (controller_pb2.RouterState(router="router-0", address="nowhere"), "state.address"),
        (controller_pb2.RouterState(router="router-0", running=-1), "state.running"),
        (controller_pb2.RouterState(router="router-0", waiting=-1), "state.waiting"),
    ],
)
def test_a_malformed_state_renews_no_lease(board, server, state, field) -> None:
    requests = iter([controller_pb2.WatchRequest(router="router-0", state=state)])
    with open_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(ControllerServiceStub(channel).WatchPlacement(requests, timeout=WAIT_S))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(f"{field}:")
    assert board.renewals == []


def test_nothing_waits_forever_without_a_controller() -> None:
    client = ControllerClient(router="router-0", resolve=lambda: "127.0.0.1:1")
    started_s = time.monotonic()
    with pytest.raises(Unavailable, match="no placement"):
        client.current(0.3)
    assert client.newer_than(NO_PLACEMENT, 0.1) is None
    client.report_failure("expert-0", "a1", "silence")
    client.want_experts(3, [0])
    with pytest.raises(DeadlineExceeded):
        client.hold(0.1)
    client.close()
    assert time.monotonic() - started_s < WAIT_S
    with pytest.raises(Unavailable):
        client.current(60.0)  # closed: does not wait


def test_the_last_placement_stands_while_the_controller_is_away_and_a_new_one_is_found_elsewhere(board) -> None:
    first = serve_controller(board, credentials=None)
    address = [first.address]
    client = ControllerClient(router="router-0", resolve=lambda: address[0])
    board.publish(placement(1, 4))
    assert client.current(WAIT_S).number == (1, 4)
    first.stop(0.0)
    assert client.current(0.0).number == (1, 4)
    successor = FakeController()
    second = serve_controller(successor, credentials=None)
    address[0] = second.address
    successor.publish(placement(2, 1))
    found = client.newer_than(PlacementNumber(1, 4), WAIT_S)
    assert found is not None and found.number == (2, 1)
    client.close()
    successor.close()
    second.stop(0.0)


def test_a_placement_of_an_older_term_is_not_taken(board, client) -> None:
    board.publish(placement(3, 1))
    assert client.current(WAIT_S).number == (3, 1)
    assert not board.publish(placement(2, 9))
    assert client.newer_than(PlacementNumber(3, 1), 0.2) is None


def test_failures_and_loads_are_reported(board, client) -> None:
    board.publish(placement(1, 1))
    client.current(WAIT_S)
    client.report_failure("expert-0", "a1", "silence")
    wait_until(lambda: board.failures == [("expert-0", "a1", "silence")])
    load = LoadSnapshot(tokens={ExpertId(layer=3, index=1): 12})
    client.report_load(load)
    wait_until(lambda: board.reports == [load])


def test_an_expert_is_asked_for_again_only_after_a_while(board, client) -> None:
    board.publish(placement(1, 1))
    client.current(WAIT_S)
    experts = tuple(ExpertId(layer=3, index=i) for i in range(2))

    def times_asked(expert: ExpertId) -> int:
        return sum(expert in wanted for _, wanted in board.wanted)

    started_s = time.monotonic()
    for _ in range(50):
        client.want_experts(3, [0, 1])
    client.want_experts(3, [])
    most = 1 + int((time.monotonic() - started_s) / WANT_AGAIN_S)
    client.want_experts(0, [1])  # a request for another expert need not wait
    wait_until(lambda: times_asked(ExpertId(layer=0, index=1)) == 1)
    wait_until(lambda: times_asked(experts[0]) >= 1)
    assert ("router-0", experts) in board.wanted and all(wanted for _, wanted in board.wanted)
    assert times_asked(experts[0]) == times_asked(experts[1]) <= most
    time.sleep(WANT_AGAIN_S)
    before = times_asked(experts[1])
    client.want_experts(3, [1])
    wait_until(lambda: times_asked(experts[1]) == before + 1)


def test_a_hold_lasts_from_the_word_of_the_controller_until_it_is_released(board, client) -> None:
    board.publish(placement(1, 1))
    client.current(WAIT_S)
    assert not any(hold for _, _, hold in board.renewals)

    def grant() -> None:
        wait_until(lambda: any(hold for _, _, hold in board.renewals))
        board.publish(placement(1, 2))  # sent before the controller knew
        board.publish(replace(placement(1, 3), held=True))

    controller = threading.Thread(target=grant)
    controller.start()
    client.hold(WAIT_S)
    controller.join(WAIT_S)
    assert client.current(0.0).held and client.current(0.0).generation == 3
    wait_until(lambda: board.renewals[-1:] == [("router-0", (1, 3), True)])
    client.release()
    wait_until(lambda: board.renewals[-1:] == [("router-0", (1, 3), False)])


@pytest.mark.parametrize("placements", [(), (placement(1, 1),)])
def test_a_hold_that_is_not_granted_in_time_is_let_go(board, client, placements) -> None:
    for each in placements:
        board.publish(each)
    with pytest.raises(DeadlineExceeded, match=r"did not say within 0\.3 s that the placement stays"):
        client.hold(0.3)
    before = len(board.renewals)
    wait_until(lambda: len(board.renewals) > before + 1)
    assert not board.renewals[-1][2]


def test_a_hold_outlives_a_change_of_the_controller(board) -> None:
    first, successor = serve_controller(board, credentials=None), FakeController()
    second = serve_controller(successor, credentials=None)
    address = [first.address]
    client = ControllerClient(router="router-0", resolve=lambda: address[0])
    board.publish(replace(placement(1, 1), held=True))
    client.hold(WAIT_S)
    address[0] = second.address
    first.stop(0.0)
    wait_until(lambda: ("router-0", (1, 1), True) in successor.renewals)
    client.close()
    successor.close()
    second.stop(0.0)


def test_status_and_checkpoint_over_the_wire(board, server) -> None:
    set_checkpoint(server.address, "/runs/step-100")
    seen = controller_status(server.address)
    assert seen == board.status() and seen.checkpoint == "/runs/step-100"
    with pytest.raises(Unavailable):
        controller_status("127.0.0.1:1", timeout_s=2.0)


MALFORMED = [
    ("ReportFailure", controller_pb2.FailureReport(reporter="r"), "actor"),
    ("ReportFailure", controller_pb2.FailureReport(reporter="\n", actor="expert-0"), "reporter"),
    ("SetCheckpoint", controller_pb2.SetCheckpointRequest(), "checkpoint"),
    ("SetCheckpoint", controller_pb2.SetCheckpointRequest(checkpoint="a\0b"), "checkpoint"),
    ("ReportLoad", controller_pb2.LoadReport(router=""), "router"),
    (
        "ReportLoad",
        controller_pb2.LoadReport(router="r", loads=[controller_pb2.ExpertLoad(expert=tensor_pb2.ExpertRef(layer=-1))]),
        "loads.expert",
    ),
]


@pytest.mark.parametrize(("method", "message", "field"), MALFORMED)
def test_a_malformed_message_is_refused_by_name_and_the_server_serves_on(server, method, message, field) -> None:
    with open_channel(server.address) as channel:
        stub = ControllerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, method)(message, timeout=WAIT_S)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert str(caught.value.details()).startswith(f"{field}:")
        assert stub.Status(controller_pb2.ControllerStatusRequest(), timeout=WAIT_S).term == 2


def test_a_watcher_without_a_name_is_refused(server) -> None:
    ended = threading.Event()

    def requests() -> Iterator[controller_pb2.WatchRequest]:
        yield controller_pb2.WatchRequest()
        ended.wait(WAIT_S)

    with open_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(ControllerServiceStub(channel).WatchPlacement(requests(), timeout=WAIT_S))
        ended.set()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "router" in str(caught.value.details())


def broken(**changes: object) -> controller_pb2.Placement:
    message = encode_placement(placement(1, 1), 10.0)
    for path, value in changes.items():
        target: Any = message
        *way, last = path.split("__")
        for step in way:
            target = target[int(step)] if step.isdigit() else getattr(target, step)
        setattr(target, last, value)
    return message


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"term": 0}, "term"),
        ({"lease_s": 0.0}, "lease_s"),
        ({"lease_s": float("inf")}, "lease_s"),
        ({"actors__0__address": "nowhere"}, "actors.address"),
        ({"actors__0__address": "host:99999"}, "actors.address"),
        ({"actors__0__incarnation": ""}, "actors.incarnation"),
        ({"replicas__0__actor": "expert-7"}, "replicas.actor"),
        ({"replicas__0__share": 0.5}, "replicas.share"),
        ({"replicas__0__share": float("nan")}, "replicas.share"),
        ({"replicas__0__expert__index": 2}, "replicas.expert"),
        ({"replicas__0__expert__layer": -1}, "replicas.expert"),
        ({"replicas__0__expert__index": 1}, "replicas"),
    ],
)
def test_a_malformed_placement_is_refused_by_name(changes, complaint) -> None:
    with pytest.raises(InvalidMessage, match=f"^{complaint}"):
        decode_placement(broken(**changes))


def test_a_placement_survives_the_wire() -> None:
    assert decode_placement(encode_placement(placement(4, 2), 10.0)) == (placement(4, 2), 10.0)


def test_a_users_error_keeps_its_line_over_the_wire(server) -> None:
    with pytest.raises(UserError, match="x is torn"):
        set_checkpoint(server.address, "x")

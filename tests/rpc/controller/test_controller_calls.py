"""Every call of users and routers to a controller over loopback, and every reason for which one is refused."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from moecluster.errors import InvalidMessage, Unavailable, UserError
from moecluster.proto import controller_pb2, tensor_pb2
from moecluster.proto.controller_pb2_grpc import ControllerServiceStub
from moecluster.rpc.controller import server as controller_server
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.server import RunningServer, open_channel
from moecluster.types import ExpertId, OperationPhase
from tests.support.expert.small_actor import served, serving
from tests.support.fakes.fake_controller import LOADS, OLD_OPERATION, PLACEMENT, PLAN, FakeController

WAIT_S = 60.0
EXPERT = ExpertId(layer=3, index=1)


@pytest.fixture
def controller() -> FakeController:
    scripted = FakeController()
    scripted.publish(PLACEMENT)
    return scripted


@pytest.fixture
def server(controller: FakeController) -> Iterator[RunningServer]:
    running = serve_controller(controller, credentials=None)
    yield running
    controller.close()
    running.stop(0.0)


@pytest.fixture
def calls(server: RunningServer) -> Iterator[ControllerCalls]:
    with ControllerCalls(server.address) as calls:
        yield calls


def test_status_loads_and_plan_come_whole(controller, calls) -> None:
    calls.scale(3, operation_id="evening")
    status = calls.status()
    assert status == controller.status()
    assert [o.id for o in status.operations] == ["evening"]
    assert calls.loads() == LOADS
    assert calls.plan() == PLAN
    assert calls.plan("eplb").policy == "eplb"
    assert controller.planned == ["", "eplb"]


def test_a_checkpoint_is_set(controller, calls) -> None:
    calls.set_checkpoint("/runs/step-100")
    assert controller.checkpoint == "/runs/step-100"


@pytest.mark.parametrize(
    ("order", "arguments"),
    [
        (lambda calls, key: calls.scale(3, operation_id=key), ("3",)),
        (lambda calls, key: calls.scale_routers(2, operation_id=key), ("2",)),
        (lambda calls, key: calls.drain("node-a", operation_id=key), ("node-a",)),
        (
            lambda calls, key: calls.place(EXPERT, ["expert-1", "expert-0"], operation_id=key),
            ("3/1", "expert-1", "expert-0"),
        ),
        (lambda calls, key: calls.place(EXPERT, (), operation_id=key), ("3/1",)),
    ],
)
def test_an_order_is_an_operation_that_may_be_asked_for_again(
    calls, order: Callable[[ControllerCalls, str], Any], arguments: tuple[str, ...]
) -> None:
    begun = order(calls, "mine")
    assert (begun.id, begun.arguments, begun.phase) == ("mine", arguments, OperationPhase.QUEUED)
    seen = [calls.operation("mine").phase for _ in range(4)]
    assert seen == [
        OperationPhase.QUEUED,
        OperationPhase.PREPARING,
        OperationPhase.COMMITTING,
        OperationPhase.DONE,
    ]
    assert order(calls, "mine") == calls.operation("mine")
    assert order(calls, "").id != "mine"


def test_operations_come_newest_first_and_as_many_as_asked(calls) -> None:
    calls.scale(3, operation_id="second")
    calls.drain("node-a", operation_id="third")
    assert [o.id for o in calls.operations()] == ["third", "second", OLD_OPERATION.id]
    assert [o.id for o in calls.operations(2)] == ["third", "second"]
    assert calls.operations()[-1] == OLD_OPERATION


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda calls: calls.scale(9), "9 expert actors: at most 8"),
        (lambda calls: calls.scale_routers(5), "5 routers: at most 4"),
        (lambda calls: calls.drain("moon"), "moon is neither a node nor an expert actor"),
        (lambda calls: calls.place(EXPERT, ["expert-7"]), "expert-7 is no expert actor"),
        (lambda calls: calls.place(ExpertId(layer=1, index=0), ["expert-0"]), "the model has no such expert"),
        (lambda calls: calls.plan("best"), 'policy "best" is not known'),
        (lambda calls: calls.operation("never"), "operation never is not known"),
        (lambda calls: calls.scale(3, operation_id=OLD_OPERATION.id), "asked for something else"),
    ],
)
def test_a_users_mistake_comes_as_its_line_and_changes_nothing(
    calls, call: Callable[[ControllerCalls], Any], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        call(calls)
    assert calls.operations() == (OLD_OPERATION,)


MALFORMED = [
    ("Scale", controller_pb2.ScaleRequest(), "expert_actors"),
    ("Scale", controller_pb2.ScaleRequest(expert_actors=-4), "expert_actors"),
    ("Scale", controller_pb2.ScaleRequest(expert_actors=1, operation_id="a\nb"), "operation_id"),
    ("Scale", controller_pb2.ScaleRequest(routers=-1), "routers"),
    ("Scale", controller_pb2.ScaleRequest(routers=1, expert_actors=1), "routers"),
    ("Drain", controller_pb2.DrainRequest(), "node"),
    ("Drain", controller_pb2.DrainRequest(node="n", operation_id="x" * 300), "operation_id"),
    ("Place", controller_pb2.PlaceRequest(actors=["expert-0"]), "expert"),
    ("Place", controller_pb2.PlaceRequest(expert=tensor_pb2.ExpertRef(index=-1)), "expert"),
    ("Place", controller_pb2.PlaceRequest(expert=tensor_pb2.ExpertRef(), actors=["a", "a"]), "actors"),
    ("Place", controller_pb2.PlaceRequest(expert=tensor_pb2.ExpertRef(), actors=[""]), "actors"),
    ("Plan", controller_pb2.PlanRequest(policy="\x07"), "policy"),
    ("GetOperation", controller_pb2.GetOperationRequest(), "id"),
    ("ListOperations", controller_pb2.ListOperationsRequest(limit=-1), "limit"),
    ("WantExperts", controller_pb2.WantRequest(), "router"),
    ("WantExperts", controller_pb2.WantRequest(router="r", experts=[tensor_pb2.ExpertRef(layer=-2)]), "experts"),
    ("WantExperts", controller_pb2.WantRequest(router="r", experts=[tensor_pb2.ExpertRef()] * 2), "experts"),
]


@pytest.mark.parametrize(("method", "message", "field"), MALFORMED)
def test_a_malformed_order_is_refused_by_name_and_nothing_begins(server, controller, method, message, field) -> None:
    with open_channel(server.address) as channel:
        stub = ControllerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, method)(message, timeout=WAIT_S)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert str(caught.value.details()).startswith(f"{field}:")
        assert stub.Status(controller_pb2.ControllerStatusRequest(), timeout=WAIT_S).term == 2
    assert controller.operations(0) == (OLD_OPERATION,)
    assert controller.wanted == []


def test_wanted_experts_arrive(server, controller) -> None:
    wanted = (EXPERT, ExpertId(layer=0, index=0))
    refs = [tensor_pb2.ExpertRef(layer=e.layer, index=e.index) for e in wanted]
    with open_channel(server.address) as channel:
        request = controller_pb2.WantRequest(router="router-0", experts=refs)
        ControllerServiceStub(channel).WantExperts(request, timeout=WAIT_S)
    assert controller.wanted == [("router-0", wanted)]


@pytest.mark.parametrize("hold", [True, False])
def test_a_router_that_trains_holds_the_placement(server, controller, hold) -> None:
    def requests() -> Iterator[controller_pb2.WatchRequest]:
        yield controller_pb2.WatchRequest(router="router-0", applied_term=1, applied_generation=2, hold=hold)

    with open_channel(server.address) as channel:
        list(ControllerServiceStub(channel).WatchPlacement(requests(), timeout=WAIT_S))
    assert controller.renewals == [("router-0", (1, 2), hold)]


def test_a_controller_that_is_starting_says_how_it_is_and_takes_no_order(monkeypatch) -> None:
    monkeypatch.setattr(controller_server, "READY_WAIT_S", 0.1)
    starting = FakeController()
    running = serve_controller(starting, credentials=None)
    with ControllerCalls(running.address) as calls:
        assert calls.status() == starting.status()
        for call in (calls.loads, calls.plan, calls.operations, lambda: calls.operation("x"), lambda: calls.scale(3)):
            with pytest.raises(Unavailable, match="the controller is starting"):
                call()
        assert starting.operations(0) == (OLD_OPERATION,)
        monkeypatch.setattr(controller_server, "READY_WAIT_S", WAIT_S)
        threading.Timer(0.2, starting.publish, [PLACEMENT]).start()
        assert calls.operations() == (OLD_OPERATION,)
    starting.close()
    running.stop(0.0)


def test_nobody_answers(calls) -> None:
    with ControllerCalls("127.0.0.1:1", timeout_s=2.0) as nobody, pytest.raises(Unavailable):
        nobody.operations()
    calls.close()
    with pytest.raises(Unavailable, match="controller at"):
        calls.status()


def test_another_service_listens_at_the_address(checkpoint) -> None:
    with (
        serving(checkpoint) as expert,
        served(expert) as server,
        ControllerCalls(server.address) as calls,
        pytest.raises(Unavailable, match="no such service"),
    ):
        calls.status()


def test_a_malformed_answer_is_no_crash(server, controller, calls) -> None:
    controller.counted = dataclasses.replace(LOADS, time_s=float("nan"))
    with pytest.raises(InvalidMessage, match="time_s"):
        calls.loads()

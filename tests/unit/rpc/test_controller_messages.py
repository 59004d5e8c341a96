"""The controller's messages round-trip, and malformed ones are refused by the name of the field."""

import dataclasses
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.errors import InvalidMessage
from moecluster.proto import controller_pb2, tensor_pb2
from moecluster.rpc.controller.load_messages import decode_cluster_loads, decode_load, encode_cluster_loads, encode_load
from moecluster.rpc.controller.operation_messages import (
    decode_operation,
    decode_operations,
    decode_plan,
    encode_operation,
    encode_operations,
    encode_plan,
)
from moecluster.rpc.controller.placement_messages import decode_placement, encode_placement
from moecluster.rpc.controller.snapshot import ControllerSnapshot, decode_snapshot, encode_snapshot
from moecluster.rpc.controller.status_messages import decode_status, encode_status
from moecluster.types import (
    ActorState,
    ClusterLoads,
    ControllerStatus,
    LoadSnapshot,
    Operation,
    Placement,
    PlanPreview,
    WeightVersion,
)
from tests.support.fakes.fake_controller import LOADS, OLD_OPERATION, PLAN, FakeController
from tests.support.malformed.controller_records import (
    cluster_loads,
    experts,
    layer_experts,
    load_snapshots,
    names,
    operation_lists,
    operations,
    placements,
    plans,
    replica_lists,
    statuses,
)


@given(placement=placements(), lease_s=st.floats(min_value=0.1, max_value=3600))
def test_placements(placement: Placement, lease_s: float) -> None:
    assert decode_placement(encode_placement(placement, lease_s)) == (placement, lease_s)


@given(operation=operations)
def test_operations(operation: Operation) -> None:
    assert decode_operation(encode_operation(operation)) == operation


@given(found=operation_lists)
def test_lists_of_operations_keep_their_order(found: tuple[Operation, ...]) -> None:
    assert decode_operations(encode_operations(found)) == found


@given(plan=plans)
def test_plans(plan: PlanPreview) -> None:
    assert decode_plan(encode_plan(plan)) == plan


@given(status=statuses)
def test_statuses(status: ControllerStatus) -> None:
    assert decode_status(encode_status(status)) == status


@given(load=load_snapshots)
def test_reports_of_load(load: LoadSnapshot) -> None:
    message = encode_load("router", load)
    assert message.router == "router" and decode_load(message) == load


@given(loads=cluster_loads())
def test_loads_of_a_cluster(loads: ClusterLoads) -> None:
    assert decode_cluster_loads(encode_cluster_loads(loads)) == loads


@st.composite
def snapshots(draw: st.DrawFn) -> ControllerSnapshot:
    actors = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    numbers = sorted(draw(st.lists(st.integers(1, 99), max_size=2, unique=True)))
    return ControllerSnapshot(
        actors=tuple(actors),
        leaving=tuple(draw(st.lists(st.sampled_from(actors), unique=True))),
        replicas=draw(replica_lists(draw(layer_experts), actors)),
        operations=draw(operation_lists),
        cold=tuple(draw(st.lists(experts, max_size=3, unique=True))),
        versions=tuple(WeightVersion(version=number, checkpoint=draw(names)) for number in numbers),
        weight_version=draw(st.sampled_from(numbers)) if numbers else 0,
        last_weight_version=draw(st.integers(99, 200)) if numbers else 0,
    )


@given(snapshot=snapshots())
def test_snapshots(snapshot: ControllerSnapshot) -> None:
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


@given(content=st.binary(max_size=200))
def test_a_snapshot_of_any_bytes_is_read_or_refused(content: bytes) -> None:
    try:
        snapshot = decode_snapshot(content)
    except InvalidMessage:
        return
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


def test_a_snapshot_of_nothing_is_empty() -> None:
    empty = ControllerSnapshot(actors=(), leaving=(), replicas=(), operations=(), cold=())
    assert decode_snapshot(b"") == empty and encode_snapshot(empty) == b""


def version_message(version: int, checkpoint: str = "/m") -> controller_pb2.WeightVersion:
    return controller_pb2.WeightVersion(version=version, checkpoint=checkpoint)


def snapshot_message(**changes: Any) -> controller_pb2.ControllerSnapshot:
    fields: dict[str, Any] = {
        "actors": ["expert-0", "expert-1"],
        "leaving": ["expert-1"],
        "replica_layers": [0, 0],
        "replica_experts": [3, 3],
        "replica_actors": [0, 1],
        "replica_shares": [0.25, 0.75],
    }
    return controller_pb2.ControllerSnapshot(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"versions": [version_message(2), version_message(1)]}, "versions"),
        ({"versions": [version_message(0)]}, "versions"),
        (
            {"versions": [version_message(i) for i in (1, 2, 3)], "weight_version": 1, "last_weight_version": 3},
            "versions",
        ),
        ({"versions": [version_message(1, "")], "weight_version": 1, "last_weight_version": 1}, "versions.checkpoint"),
        ({"versions": [version_message(1)], "weight_version": 2, "last_weight_version": 2}, "weight_version"),
        ({"versions": [version_message(3)], "weight_version": 3, "last_weight_version": 2}, "weight_version"),
        ({"actors": ["expert-0", "expert-0"]}, "actors"),
        ({"actors": ["expert-0", ""]}, "actors"),
        ({"leaving": ["expert-7"]}, "leaving"),
        ({"replica_layers": [0]}, "replica_layers"),
        ({"replica_shares": []}, "replica_layers"),
        ({"replica_layers": [0, -1]}, "replica_layers"),
        ({"replica_experts": [-1, 3]}, "replica_experts"),
        ({"replica_actors": [0, 2]}, "replica_actors"),
        ({"replica_actors": [0, -1]}, "replica_actors"),
        ({"replica_actors": [0, 0]}, "replicas"),
        ({"replica_shares": [0.5, math.nan]}, "replica_shares"),
        ({"replica_shares": [0.5, math.inf]}, "replica_shares"),
        ({"replica_shares": [0.5, -0.5]}, "replica_shares"),
        ({"operations": [controller_pb2.Operation(id="a", kind="scale", phase="asleep")]}, "phase"),
        ({"cold": [tensor_pb2.ExpertRef(layer=-1)]}, "cold"),
    ],
)
def test_a_malformed_snapshot_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    assert len(decode_snapshot(snapshot_message().SerializeToString()).replicas) == 2
    with pytest.raises(InvalidMessage, match=rf"^{field}:"):
        decode_snapshot(snapshot_message(**changes).SerializeToString())


def test_a_torn_snapshot_is_refused() -> None:
    content = snapshot_message().SerializeToString()
    with pytest.raises(InvalidMessage, match=r"^snapshot: \d+ bytes"):
        decode_snapshot(content[:-3])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"phase": "asleep"}, "phase"),
        ({"phase": ""}, "phase"),
        ({"id": ""}, "id"),
        ({"kind": "a\nb"}, "kind"),
        ({"created_s": math.nan}, "created_s"),
        ({"created_s": -1.0}, "created_s"),
        ({"ended_s": math.inf}, "ended_s"),
        ({"balancedness_before": math.nan}, "balancedness_before"),
        ({"balancedness_measured": -math.inf}, "balancedness_measured"),
        ({"added_replicas": -1}, "added_replicas"),
        ({"removed_replicas": -1}, "removed_replicas"),
    ],
)
def test_a_malformed_operation_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    message = encode_operation(OLD_OPERATION)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(InvalidMessage, match=f"^{field}: "):
        decode_operation(message)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"policy": ""}, "policy"),
        ({"moved_bytes": math.nan}, "moved_bytes"),
        ({"moved_bytes": -1.0}, "moved_bytes"),
        ({"balancedness_before": math.inf}, "balancedness_before"),
        ({"balancedness_after": math.nan}, "balancedness_after"),
        ({"changed_shares": -1}, "changed_shares"),
    ],
)
def test_a_malformed_plan_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    message = encode_plan(PLAN)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(InvalidMessage, match=f"^{field}: "):
        decode_plan(message)


@pytest.mark.parametrize(("part", "name"), [("added", "expert-0\n"), ("removed", "")])
def test_a_plans_replica_without_a_proper_actor_is_refused(part: str, name: str) -> None:
    message = encode_plan(PLAN)
    getattr(message, part)[0].actor = name
    with pytest.raises(InvalidMessage, match=rf"^{part}\.actor: "):
        decode_plan(message)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"time_s": math.nan}, "time_s"),
        ({"layer_experts": {0: 2}}, "expert_bytes"),
        ({"layer_experts": {0: 0, 3: 4}}, "layer_experts"),
        ({"layer_experts": {0: 2, 3: 5}}, "routers.layers.assignments"),
        ({"expert_bytes": {0: 1.0, 3: -1.0}}, "expert_bytes"),
        ({"actors": (dataclasses.replace(LOADS.actors[0], speed=0.0),)}, "actors.speed"),
        ({"actors": (dataclasses.replace(LOADS.actors[0], speed=math.inf),)}, "actors.speed"),
        ({"actors": (dataclasses.replace(LOADS.actors[0], busy_s=-1.0),)}, "actors.busy_s"),
        ({"actors": (dataclasses.replace(LOADS.actors[0], slots=-1),)}, "actors.slots"),
        ({"actors": (LOADS.actors[0], LOADS.actors[0])}, "actors.actor"),
        ({"tokens": {"": {}}}, "routers.router"),
        ({"tokens": {"router": {7: (1,)}}}, "routers.layers.assignments"),
    ],
)
def test_malformed_loads_are_refused_by_name(change: dict[str, Any], field: str) -> None:
    message = encode_cluster_loads(dataclasses.replace(LOADS, **change))
    with pytest.raises(InvalidMessage, match=f"^{field.replace('.', '[.]')}: "):
        decode_cluster_loads(message)


def test_loads_that_name_a_router_twice_are_refused() -> None:
    message = encode_cluster_loads(LOADS)
    message.routers.append(message.routers[0])
    with pytest.raises(InvalidMessage, match=r"^routers\.router: router is named twice"):
        decode_cluster_loads(message)


def test_loads_that_name_a_layer_twice_are_refused() -> None:
    message = encode_cluster_loads(LOADS)
    message.routers[0].layers.append(message.routers[0].layers[0])
    with pytest.raises(InvalidMessage, match=r"^routers\.layers\.layer: 0 is named twice"):
        decode_cluster_loads(message)


def test_a_report_that_names_an_expert_twice_is_refused() -> None:
    message = controller_pb2.LoadReport(router="r", loads=[controller_pb2.ExpertLoad(assignments=n) for n in (1, 2)])
    with pytest.raises(InvalidMessage, match=r"^loads\.expert: "):
        decode_load(message)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"actor": ""}, "actors.actor"), ({"experts": -1}, "actors.experts")],
)
def test_a_malformed_status_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    status = FakeController().status()
    broken: ActorState = dataclasses.replace(status.actors[0], **change)
    with pytest.raises(InvalidMessage, match=field.replace(".", "[.]")):
        decode_status(encode_status(dataclasses.replace(status, actors=(broken,))))


@pytest.mark.parametrize("phase", ["", "asleep"])
def test_an_unknown_phase_of_an_actor_is_refused_with_those_that_there_are(phase: str) -> None:
    message = encode_status(FakeController().status())
    message.actors[0].phase = phase
    expected = f"actors.phase: {phase!r}, expected one of restarting, loading, serving"
    with pytest.raises(InvalidMessage, match=f"^{re.escape(expected)}$"):
        decode_status(message)


@pytest.mark.parametrize(("change", "field"), [({"phase": "nowhere"}, "phase"), ({"kind": "wake"}, "kind")])
def test_an_unknown_kind_or_phase_of_an_operation_is_refused(change: dict[str, str], field: str) -> None:
    message = encode_status(FakeController().status())
    message.operations.add(**{"id": "x", "kind": "activate", "phase": "queued"} | change)
    with pytest.raises(InvalidMessage, match=rf"^{field}: '{change[field]}', expected one of .*, "):
        decode_status(message)

import pytest

from moecluster.controller.state.operation_log import MAX_KEPT, MAX_KEPT_RESHARES, MAX_QUEUED, OperationLog
from moecluster.errors import Exhausted, ResourceError
from moecluster.metrics import Metrics
from moecluster.types import Operation, OperationKind, OperationPhase


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(model="tiny")


@pytest.fixture
def log(metrics: Metrics) -> OperationLog:
    return OperationLog(metrics)


def test_the_same_id_is_the_same_operation(log) -> None:
    first = log.enqueue(OperationKind.SCALE, reason="requested", arguments=("3",), operation_id="grow")
    assert log.enqueue(OperationKind.SCALE, reason="requested", arguments=("3",), operation_id="grow") == first
    with pytest.raises(ResourceError, match="grow is scale 3 already; give another id"):
        log.enqueue(OperationKind.SCALE, reason="requested", arguments=("4",), operation_id="grow")
    assert len(log.newest()) == 1


def test_operations_wait_in_order_up_to_a_bound(log) -> None:
    orders = [log.enqueue(OperationKind.SCALE, reason="", arguments=(str(i),)) for i in range(MAX_QUEUED)]
    with pytest.raises(Exhausted):
        log.enqueue(OperationKind.SCALE, reason="", arguments=("1",))
    assert log.queued({OperationKind.SCALE})[0] == orders[0]
    log.update(orders[0].id, phase=OperationPhase.DONE)
    assert log.queued({OperationKind.SCALE})[0] == orders[1]
    assert log.queued({OperationKind.DRAIN}) == ()


def test_ended_operations_are_kept_up_to_a_bound_the_newest_first(log) -> None:
    waiting = log.enqueue(OperationKind.DRAIN, reason="", arguments=("node",))
    for _ in range(MAX_KEPT + 20):
        log.update(log.begin(OperationKind.REBALANCE, reason="").id, phase=OperationPhase.DONE)
    last = log.begin(OperationKind.REBALANCE, reason="")
    kept = log.newest()
    assert kept[0] == last and waiting in kept
    assert len(kept) == MAX_KEPT + 2
    assert log.newest(3) == kept[:3]


def test_changes_of_shares_push_nothing_else_out(log) -> None:
    waiting = log.enqueue(OperationKind.SCALE, reason="", arguments=("3",))
    moved = log.begin(OperationKind.REBALANCE, reason="")
    log.update(moved.id, phase=OperationPhase.DONE)
    for _ in range(MAX_KEPT + 20):
        log.update(log.begin(OperationKind.RESHARE, reason="").id, phase=OperationPhase.DONE)
    log.begin(OperationKind.RESHARE, reason="")
    kinds = [o.kind for o in log.newest()]
    assert kinds.count(OperationKind.RESHARE) == MAX_KEPT_RESHARES + 1
    assert kinds[-2:] == [OperationKind.REBALANCE, OperationKind.SCALE]
    left = log.for_successor(4)
    assert left[0] == waiting and len(left) == 6, "what waits, four that ended, and the one that has begun"


def test_ends_are_dated_and_counted(log, metrics) -> None:
    operation = log.begin(OperationKind.REBALANCE, reason="hot", balancedness_before=0.5)
    log.count_moved(operation.id, loaded_bytes=100, added=2, removed=1)
    log.count_moved(operation.id, loaded_bytes=50, added=1, removed=0)
    done = log.update(operation.id, phase=OperationPhase.DONE)
    assert done.ended_s is not None and (done.moved_bytes, done.added_replicas, done.removed_replicas) == (150, 3, 1)
    shown = metrics.render()
    assert 'operations_total{cluster="",kind="rebalance",model="tiny",phase="done"} 1.0' in shown
    assert "moved_bytes_total" in shown and " 150.0" in shown


def test_a_successor_goes_on_with_what_was_ordered_and_fails_the_rest(log) -> None:
    def left(kind: OperationKind, phase: OperationPhase) -> Operation:
        return Operation(id=f"{kind}-{phase.value}", kind=kind, phase=phase, reason="", created_s=1.0)

    log.take_over(
        (
            left(OperationKind.SCALE, OperationPhase.COMMITTING),
            left(OperationKind.REBALANCE, OperationPhase.PREPARING),
            left(OperationKind.PLACE, OperationPhase.DONE),
        ),
    )
    assert {o.id: o.phase.value for o in log.newest()} == {
        "scale-committing": "queued",
        "rebalance-preparing": "failed",
        "place-done": "done",
    }
    assert "controller was restarted" in log.get("rebalance-preparing").detail


def test_changes_are_told(metrics) -> None:
    told: list[int] = []
    log = OperationLog(metrics, on_change=lambda: told.append(1))
    operation = log.enqueue(OperationKind.SCALE, reason="", arguments=("2",))
    log.update(operation.id, detail="waiting")
    assert len(told) == 2


def counted(metrics: Metrics) -> dict[str, float]:
    """Phase -> operations_total, summed over kinds."""
    found: dict[str, float] = {}
    for line in metrics.render().splitlines():
        if line.startswith("moecluster_operations_total{"):
            phase = line.partition('phase="')[2].partition('"')[0]
            found[phase] = found.get(phase, 0.0) + float(line.split()[-1])
    return found


def test_an_operation_counts_once_in_each_phase_that_it_reaches(log, metrics) -> None:
    operation = log.enqueue(OperationKind.SCALE, reason="", arguments=("3",))
    for _ in range(10):  # it waits, is tried, and waits again; and proceeds layer by layer
        log.update(operation.id, phase=OperationPhase.PREPARING)
        log.update(operation.id, phase=OperationPhase.COMMITTING)
        log.update(operation.id, phase=OperationPhase.QUEUED, detail="waits")
    log.update(operation.id, phase=OperationPhase.DONE)
    assert counted(metrics) == {"queued": 1, "preparing": 1, "committing": 1, "done": 1}
    log.update(log.begin(OperationKind.REBALANCE, reason="").id, phase=OperationPhase.FAILED)
    assert sum(counted(metrics).values()) == 6


def test_a_successor_counts_only_the_phases_that_its_predecessor_did_not_see(log, metrics) -> None:
    def left(kind: OperationKind, phase: OperationPhase) -> Operation:
        return Operation(id=kind, kind=kind, phase=phase, reason="", created_s=1.0)

    log.take_over(
        (left(OperationKind.SCALE, OperationPhase.PREPARING), left(OperationKind.REBALANCE, OperationPhase.COMMITTING)),
    )
    assert counted(metrics) == {"failed": 1}, "the rebalance has failed just now"
    for phase in (OperationPhase.PREPARING, OperationPhase.COMMITTING, OperationPhase.DONE):
        log.update("scale", phase=phase)
    assert {phase: n for phase, n in counted(metrics).items() if n} == {"failed": 1, "committing": 1, "done": 1}


def test_bytes_that_a_failed_operation_has_moved_are_counted(log, metrics) -> None:
    operation = log.begin(OperationKind.REBALANCE, reason="hot")
    log.count_moved(operation.id, loaded_bytes=100, added=1, removed=0)
    log.update(operation.id, phase=OperationPhase.FAILED)
    assert 'moved_bytes_total{cluster="",kind="rebalance",model="tiny"} 100.0' in metrics.render()
    assert "operation_seconds_count" not in metrics.render()


def test_a_successor_whose_clock_is_behind_ends_nothing_before_it_began(metrics) -> None:
    now_s = 1000.0
    log = OperationLog(metrics, unix_clock=lambda: now_s)
    ahead_s = now_s + 300.0  # the predecessor ran on a host whose clock is five minutes ahead
    kinds = (OperationKind.SCALE, OperationKind.REBALANCE)
    log.take_over(
        tuple(Operation(id=k, kind=k, phase=OperationPhase.COMMITTING, reason="", created_s=ahead_s) for k in kinds)
    )
    assert log.get("rebalance").ended_s == ahead_s
    assert log.update("scale", phase=OperationPhase.DONE).ended_s == ahead_s
    assert "operation_seconds_count" not in metrics.render(), "two clocks measure no duration"
    own = log.begin(OperationKind.REBALANCE, reason="hot")
    now_s = 900.0  # the clock is set
    assert log.update(own.id, phase=OperationPhase.DONE).ended_s == 1000.0
    assert 'operation_seconds_count{cluster="",kind="rebalance",model="tiny"} 1.0' in metrics.render()

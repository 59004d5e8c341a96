"""The queue of an expert actor: bounded, fair, and merged across routers."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecluster.errors import Exhausted, MoeClusterError, Unavailable
from moecluster.expert import queue as compute_queue
from moecluster.expert.queue import ComputeQueue, Waiting
from moecluster.types import ComputeBatch, ComputeResult, Phase
from tests.support.expert.batches import make_batch

ROW_BYTES = 16  # of float32 rows of width 4


def waiting(rows: int = 1, *, phase: Phase = Phase.FORWARD, arrived_s: float | None = None, **given: Any) -> Waiting:
    def reply(outcome: ComputeResult | MoeClusterError) -> None:
        raise AssertionError("a queue does not answer")

    batch = make_batch({0: list(range(rows))}, rows=rows, width=4, phase=phase, **given)
    return Waiting(batch=batch, reply=reply, arrived_s=time.monotonic() if arrived_s is None else arrived_s)


def queue_of(entries: Sequence[Waiting], max_bytes: int = 2**20) -> ComputeQueue:
    queue = ComputeQueue(max_bytes)
    for entry in entries:
        queue.put(entry)
    return queue


def test_forward_batches_of_one_layer_are_taken_together() -> None:
    first, other_layer, third = waiting(2), waiting(1, layer=7), waiting(3)
    queue = queue_of([first, other_layer, third])
    assert queue.rows == 6
    assert queue.take() == [first, third]
    assert queue.rows == 1
    assert queue.take() == [other_layer]
    assert queue.rows == 0


@pytest.mark.parametrize(
    "unlike",
    [
        {"layer": 1},
        {"phase": Phase.TRAIN_FORWARD},
        {"phase": Phase.BACKWARD},
        {"weight_version": 2},
        {"unsummed": True},
        {"dtype": torch.bfloat16},
        {"x_ND": torch.zeros(1, 5)},
    ],
    ids=str,
)
def test_what_differs_is_computed_by_itself(unlike: dict[str, Any]) -> None:
    first, other, third = waiting(), waiting(**unlike), waiting()
    queue = queue_of([first, other, third])
    assert queue.take() == [first, third]
    assert queue.take() == [other]


def test_training_batches_keep_their_order_and_company_waits() -> None:
    entries = [waiting(phase=phase) for phase in (Phase.TRAIN_FORWARD, Phase.BACKWARD, Phase.TRAIN_FORWARD)]
    forward = waiting()
    queue = queue_of([*entries[:1], forward, *entries[1:]])
    assert [queue.take() for _ in range(4)] == [[entries[0]], [forward], [entries[1]], [entries[2]]]


def test_equal_batches_of_two_routers_are_two_batches() -> None:
    """Routers number their messages independently."""
    entries = [waiting(2, request_id=1, arrived_s=5.0) for _ in range(2)]
    assert entries[0] != entries[1]
    taken = queue_of(entries).take()
    assert taken[0] is entries[0] and taken[1] is entries[1]


def test_merging_stops_at_its_limit_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_queue, "MAX_MERGED_ROWS", 10)
    sizes = [4, 5, 3, 1]
    entries = [waiting(rows) for rows in sizes]
    queue = queue_of(entries)
    assert queue.take() == [entries[0], entries[1], entries[3]]
    assert queue.take() == [entries[2]]
    single = queue_of([waiting(11), waiting(1)])
    assert [len(single.take()), len(single.take())] == [1, 1]


def test_a_full_queue_refuses_and_takes_again_when_it_was_emptied() -> None:
    queue = ComputeQueue(max_bytes=3 * ROW_BYTES)
    queue.put(waiting(2))
    with pytest.raises(Exhausted, match=f"{2 * ROW_BYTES} bytes wait, at most {3 * ROW_BYTES}"):
        queue.put(waiting(2))
    queue.put(waiting(1))
    with pytest.raises(Exhausted):
        queue.put(waiting(1))
    queue.take()
    queue.put(waiting(3))


def test_an_empty_queue_takes_a_batch_of_any_size() -> None:
    queue = ComputeQueue(max_bytes=1)
    queue.put(waiting(50))
    with pytest.raises(Exhausted):
        queue.put(waiting(1))
    assert len(queue.take()[0].batch.x_ND) == 50
    queue.put(waiting(50))


def test_a_backward_batch_counts_its_gradients_too() -> None:
    queue = ComputeQueue(max_bytes=3 * ROW_BYTES)
    queue.put(waiting(1, phase=Phase.BACKWARD))
    with pytest.raises(Exhausted, match=f"{2 * ROW_BYTES} bytes wait"):
        queue.put(waiting(2))


@pytest.mark.parametrize("wake_later", [False, True])
def test_who_waits_is_woken_by_a_batch(wake_later: bool) -> None:
    queue, entry = ComputeQueue(2**20), waiting()
    waited: list[bool] = []
    thread = threading.Thread(target=lambda: waited.append(queue.wait()))
    thread.start()
    assert not waited and queue.take() == []
    queue.put(entry, wake=not wake_later)
    if wake_later:
        queue.wake()
    thread.join(5.0)
    assert waited == [True] and queue.take() == [entry] and queue.take() == []


def test_a_closed_queue_is_emptied_and_then_ends_and_takes_no_more() -> None:
    entry = waiting()
    queue = queue_of([entry])
    queue.close()
    with pytest.raises(Unavailable):
        queue.put(waiting())
    assert queue.wait() and queue.take() == [entry]
    assert not queue.wait() and queue.take() == []


def test_closing_wakes_who_waits() -> None:
    queue = ComputeQueue(2**20)
    waited: list[bool] = []
    thread = threading.Thread(target=lambda: waited.append(queue.wait()))
    thread.start()
    queue.close()
    thread.join(5.0)
    assert waited == [False]


def test_a_batch_expires_after_its_deadline() -> None:
    now_s = time.monotonic()
    assert waiting(deadline_s=1.0, arrived_s=now_s - 1.1).expired
    assert not waiting(deadline_s=100.0, arrived_s=now_s - 1.1).expired


def group_of(batch: ComputeBatch) -> tuple[object, ...]:
    return (batch.layer, batch.phase, batch.unsummed)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([Phase.FORWARD, Phase.FORWARD, Phase.BACKWARD]), st.booleans()),
        max_size=12,
    )
)
def test_every_batch_is_taken_once_and_none_is_overtaken_by_its_like(kinds: list[tuple[int, Phase, bool]]) -> None:
    entries = [waiting(layer=layer, phase=phase, unsummed=unsummed) for layer, phase, unsummed in kinds]
    queue = queue_of(entries)
    queue.close()
    taken: list[Waiting] = []
    while group := queue.take():
        assert len({group_of(entry.batch) for entry in group}) == 1
        assert group[0].batch.phase is Phase.FORWARD or len(group) == 1
        assert group[0] is next(entry for entry in entries if entry not in taken), "the oldest goes first"
        taken += group
    assert sorted(map(id, taken)) == sorted(map(id, entries))
    for kind in {group_of(entry.batch) for entry in entries}:
        alike = [entry for entry in taken if group_of(entry.batch) == kind]
        assert alike == [entry for entry in entries if group_of(entry.batch) == kind]

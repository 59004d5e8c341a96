"""An expert actor's status: the snapshot that it keeps, and its work counters."""

import time

import pytest

from moecluster.errors import DeadlineExceeded, InvalidMessage
from moecluster.expert.service import ExpertService
from moecluster.rpc.expert.interface import MAX_SNAPSHOT_BYTES
from moecluster.rpc.expert.requests import PlacementNotice
from tests.support.exhaustion.descriptors import no_descriptors
from tests.support.expert.small_actor import (
    TIMEOUT_S,
    Occupied,
    batch_of,
    submit,
)
from tests.support.waiting import wait_until


def test_the_controller_s_snapshot_is_kept_for_its_successor(service: ExpertService) -> None:
    service.set_placement(PlacementNotice(term=3, generation=2, snapshot=b"first"))
    service.set_placement(PlacementNotice(term=3, generation=3))
    assert service.status().snapshot == b""
    assert service.status(with_snapshot=True).snapshot == b"first"
    service.set_placement(PlacementNotice(term=3, generation=1, snapshot=b"overtaken on its way"))
    assert service.status(with_snapshot=True).snapshot == b"first"
    largest = bytes(MAX_SNAPSHOT_BYTES)
    service.set_placement(PlacementNotice(term=4, generation=1, snapshot=largest))
    with pytest.raises(InvalidMessage, match=f"snapshot: {MAX_SNAPSHOT_BYTES + 1} bytes, at most {MAX_SNAPSHOT_BYTES}"):
        service.set_placement(PlacementNotice(term=5, generation=1, snapshot=largest + b"x"))
    status = service.status(with_snapshot=True)
    assert (status.placement, status.snapshot) == ((4, 1), largest)


def test_work_is_counted(service: ExpertService) -> None:
    idle = service.status().work
    assert (idle.computed_rows, idle.batches, idle.queue_rows, idle.busy_s, idle.queue_wait_s) == (0, 0, 0, 0.0, 0.0)
    with Occupied(service):  # a batch of 2 rows and 3 pairs
        futures = [
            submit(service, batch_of(4)),
            submit(service, batch_of(1)),
            submit(service, batch_of(deadline_s=0.01)),
        ]
        time.sleep(0.1)
        assert service.status().work.queue_rows == 7
    for future in futures[:2]:
        future.result(TIMEOUT_S)
    with pytest.raises(DeadlineExceeded):
        futures[2].result(TIMEOUT_S)
    # Batches are counted a little after their replies.
    wait_until(lambda: service.status().work.batches >= 4, "the count of all batches")
    work = service.status().work
    assert (work.computed_rows, work.batches, work.queue_rows) == (3 + 5 + 2, 4, 0)
    assert 3 * 0.1 <= work.queue_wait_s < 30.0
    assert 0.1 <= work.busy_s < 30.0


def test_without_a_free_descriptor_the_memory_is_what_it_was(service: ExpertService) -> None:
    before = service.status().rss_bytes
    assert before > 10_000_000
    with no_descriptors():
        assert service.status().rss_bytes == before

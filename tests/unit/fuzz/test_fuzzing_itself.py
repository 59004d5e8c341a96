"""What fuzzing finds: errors, dead threads, inputs without end, and memory that is not given back."""

import mmap
import random
import threading
import time
from collections.abc import Callable

import pytest

from moecluster.errors import InvalidMessage
from moecluster.proto import controller_pb2, expert_pb2
from tests.support.fuzz import run
from tests.support.fuzz.messages import message_of
from tests.support.fuzz.run import Found, repeat, run_many


def refuse(data: bytes) -> None:
    raise InvalidMessage("x", "as it should")


def fail(data: bytes) -> None:
    raise KeyError("x")


def compute(data: bytes) -> None:
    while True:
        pass


def wait(data: bytes) -> None:
    threading.Event().wait()


def die(data: bytes) -> None:
    thread = threading.Thread(target=fail, args=(data,))
    thread.start()
    thread.join()


def test_what_other_threads_compute_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CPU_LIMIT_S", 0.2)

    def work() -> None:
        while time.thread_time() < 0.5:
            pass

    def wait_for_work(data: bytes) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    run_many(wait_for_work, 1)


def test_what_is_refused_is_no_finding() -> None:
    run_many(refuse, 20)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (fail, "KeyError: 'x': 00ff"),
        (compute, "too much CPU"),
        (wait, "too much time"),
        (die, "a thread died: KeyError"),
    ],
)
def test_what_may_not_happen_is_named_with_its_input(
    target: Callable[[bytes], None], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "CPU_LIMIT_S", 0.2)
    monkeypatch.setattr(run, "WALL_LIMIT_S", 0.5 if target is wait else 60.0)
    with pytest.raises(Found, match=expected) as found:
        repeat(target, ["00ff"])
    assert "00ff" in str(found.value)


def test_memory_that_grows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MAX_GROWTH_BYTES", 16 * 2**20)
    kept: list[mmap.mmap] = []

    def keep(data: bytes) -> None:
        pages = mmap.mmap(-1, 2**20)  # new ones: the heap may have some to give again
        pages.write(b"x" * 2**20)
        kept.append(pages)

    with pytest.raises(Found, match="bytes behind"):
        run_many(keep, 40)


def test_inputs_are_the_same_for_a_seed() -> None:
    seen: list[list[bytes]] = [[], [], []]
    for inputs, seed in zip(seen, (0, 0, 1), strict=True):
        run_many(inputs.append, 50, seed=seed)
    assert seen[0] == seen[1] != seen[2]


def test_messages_are_torn_odd_and_nearly_good() -> None:
    good = expert_pb2.SetPlacementRequest(term=7, generation=9, checkpoint="/model")
    rng = random.Random(0)
    made = [message_of(rng.randbytes(200), expert_pb2.SetPlacementRequest, [good]) for _ in range(400)]
    assert None in made  # no message at all
    found = [message for message in made if message is not None]
    assert sum((message.term, message.generation) == (7, 9) for message in found) > 20
    assert len({message.SerializeToString() for message in found}) > 150
    nested = [message_of(rng.randbytes(300), controller_pb2.Placement) for _ in range(100)]
    assert any(message is not None and message.actors and message.layer_experts for message in nested)

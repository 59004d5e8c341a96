"""Reading experts in several threads: in order, only as far ahead as allowed, and stoppable."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from moecluster.errors import CheckpointError, StaleRequest
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.experts.prefetch import loaded_bytes, read_ahead
from moecluster.models.experts.source import ExpertSource
from moecluster.types import ExpertId
from tests.support.models.families import make_model, save
from tests.support.waiting import WAIT_S, wait_until

EXPERTS = [ExpertId(layer=layer, index=index) for layer in (0, 1) for index in range(4)]


class Watched(ExpertSource):
    """Tracks how many experts are being read, and blocks each read until it may end."""

    def __init__(self, directory: Path) -> None:
        super().__init__(Checkpoint.open(directory))
        self.begun: list[ExpertId] = []
        self.may_end = threading.Semaphore(0)
        self.fails: set[ExpertId] = set()

    def load(self, expert: ExpertId, dtype: torch.dtype = torch.float32) -> nn.Module:
        self.begun.append(expert)
        assert self.may_end.acquire(timeout=WAIT_S)
        if expert in self.fails:
            raise CheckpointError(f"{expert} is torn")
        return super().load(expert, dtype)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("mixtral")
    save(make_model("mixtral"), found, "per-expert")
    return found


@pytest.fixture
def source(directory: Path) -> Iterator[Watched]:
    found = Watched(directory)
    yield found
    found.may_end.release(len(EXPERTS))  # no reader is left waiting


def wait_begun(source: Watched, number: int) -> None:
    wait_until(lambda: len(source.begun) >= number, f"the begin of read {number}")
    time.sleep(0.05)  # for one too many
    assert len(source.begun) == number


def test_what_comes_is_what_was_asked_for_in_its_order(directory: Path) -> None:
    source = ExpertSource(directory)
    wanted = EXPERTS[::-1]
    read = list(read_ahead(source, wanted, torch.bfloat16))
    assert [expert for expert, _ in read] == wanted
    for expert, module in read:
        expected = source.load(expert, torch.bfloat16).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
        assert loaded_bytes(source, expert, torch.bfloat16) == sum(v.nbytes for v in expected.values())


@pytest.mark.parametrize(("max_ahead_bytes", "readers", "at_once"), [(2**30, 3, 3), (1, 3, 2), (2**30, 8, 8)])
def test_only_so_much_is_read_ahead(source: Watched, max_ahead_bytes: int, readers: int, at_once: int) -> None:
    experts = read_ahead(source, EXPERTS, torch.float32, readers=readers, max_ahead_bytes=max_ahead_bytes)
    first = threading.Thread(target=lambda: next(experts))
    first.start()
    wait_begun(source, at_once)
    source.may_end.release(len(EXPERTS))
    first.join(WAIT_S)
    assert len(list(experts)) == len(EXPERTS) - 1


def test_an_error_comes_in_its_turn(source: Watched) -> None:
    source.fails = {EXPERTS[2]}
    source.may_end.release(len(EXPERTS))
    experts = read_ahead(source, EXPERTS, torch.float32)
    assert [next(experts)[0] for _ in range(2)] == EXPERTS[:2]
    with pytest.raises(CheckpointError, match="0/2 is torn"):
        next(experts)


def test_a_read_that_hangs_ends_with_its_order(source: Watched) -> None:
    stale = threading.Event()

    def check(expert: ExpertId) -> None:
        if stale.is_set():
            raise StaleRequest("term 1 is over")

    experts = read_ahead(source, EXPERTS, torch.float32, check=check)
    threading.Timer(0.2, stale.set).start()
    with pytest.raises(StaleRequest):
        next(experts)
    assert len(source.begun) <= 4

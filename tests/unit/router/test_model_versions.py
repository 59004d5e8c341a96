"""Which trunk generates a sequence while the placement names one version after another."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.dispatch.trunk_backend import TrunkBackend
from moecluster.errors import CheckpointError, StaleRequest, Unavailable
from moecluster.router.model_versions import POLL_S, ModelVersions
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import Placement, PlacementNumber
from tests.support.waiting import WAIT_S, wait_until

FIRST = Placement(term=1, generation=1, layer_experts={0: 1}, actors={}, replicas=(), weight_version=1, checkpoint="/1")


class Board(PlacementBoard):
    """The placements seen by a router's pool; each is published with the next number."""

    def say(self, served: int, following: int = 0, *, old: int = 0) -> None:
        number = self.number[1] + 1 if self.number[0] >= 0 else 1
        self.publish(
            replace(
                FIRST,
                generation=max(number, 1),
                weight_version=served,
                checkpoint=f"/{served}",
                next_weight_version=following,
                next_checkpoint=f"/{following}" if following else "",
                old_weight_version=old,
            )
        )

    def placement(self, timeout_s: float) -> Placement:
        return self.current(timeout_s)

    def wait_for_change(self, number: PlacementNumber, timeout_s: float) -> bool:
        return self.newer_than(number, timeout_s) is not None


class Loads:
    """Fake loading: the trunk is the directory's name."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.closed: list[str] = []
        self.torn: set[str] = set()
        self.go = threading.Event()
        self.go.set()

    def load(self, path: Path, backend: TrunkBackend) -> str:
        self.go.wait(WAIT_S)
        if str(path) in self.torn:
            raise CheckpointError(f"{path} is torn")
        self.loaded.append(str(path))
        return str(path)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def make(board: Board, loads: Loads) -> Iterator[Callable[..., ModelVersions[str]]]:
    made: list[ModelVersions[str]] = []

    def make_versions(path: str = "/1", **options: Any) -> ModelVersions[str]:
        experts = cast(RemoteExperts, SimpleNamespace(pool=board))
        made.append(ModelVersions(path, experts, load=loads.load, close=loads.closed.append, **options))
        return made[-1]

    yield make_versions
    loads.go.set()
    for versions in made:
        versions.close()


def seen(versions: ModelVersions[str]) -> tuple[int, int, int]:
    in_use = versions.in_use()
    return in_use.newest, in_use.oldest, in_use.ready


def test_a_request_keeps_its_version_and_the_last_one_closes_it(board, loads, make) -> None:
    changes: list[None] = []
    versions = make(on_change=lambda: changes.append(None))
    board.say(1)
    first, second = versions.use(), versions.use()
    assert (first.model, first.version, seen(versions)) == ("/1", 1, (1, 1, 1))
    board.say(1, following=2)
    wait_until(lambda: seen(versions) == (1, 1, 2))
    with versions.use() as still_old:
        assert still_old.model == "/1"
    board.say(2)
    wait_until(lambda: seen(versions) == (2, 1, 2))
    with versions.use() as new:
        assert (new.model, new.version, new.path) == ("/2", 2, Path("/2"))
    before = len(changes)
    first.release()
    first.release()  # again is fine
    assert seen(versions) == (2, 1, 2) and loads.closed == []
    second.release()
    assert seen(versions) == (2, 2, 2) and len(changes) == before + 1
    wait_until(lambda: loads.closed == ["/1"])
    assert loads.loaded == ["/1", "/2"]


def test_a_request_of_another_router_goes_on_with_its_version_while_that_stands(board, loads, make) -> None:
    changes: list[None] = []
    versions = make(on_change=lambda: changes.append(None))
    board.say(1, following=2)
    wait_until(lambda: seen(versions) == (1, 1, 2))
    with versions.use(version=2) as ahead:  # its router switched to the new version a little earlier
        assert (ahead.model, seen(versions)) == ("/2", (1, 1, 2))
    board.say(2, old=1)
    wait_until(lambda: seen(versions) == (2, 2, 2))
    time.sleep(2 * POLL_S)
    assert loads.closed == [], "nobody writes with it here, but somebody may go on"
    before = len(changes)
    with versions.use(version=1) as old, versions.use() as new, versions.use(version=2):
        assert (old.model, new.model, seen(versions)) == ("/1", "/2", (2, 1, 2))
        assert len(changes) == before + 1, "the controller is told at once"
        board.say(2)
        time.sleep(2 * POLL_S)
        assert loads.closed == []
    wait_until(lambda: loads.closed == ["/1"])
    for version in (1, 3):
        with pytest.raises(StaleRequest, match=f"weight version {version} is not held here: 2 is served"):
            versions.use(version=version)


def test_a_new_request_waits_until_the_router_knows_what_is_served(board, loads, make) -> None:
    versions = make("/1")
    assert seen(versions) == (0, 0, 0)
    with pytest.raises(Unavailable, match="what is served: no controller has said so yet"):
        versions.use(0.1)
    board.say(4)  # the directory that it was started with is no longer served
    with versions.use() as use:
        assert (use.model, use.version) == ("/4", 4)
    wait_until(lambda: loads.closed == ["/1"])


def test_a_version_that_is_given_up_is_closed(board, loads, make) -> None:
    versions = make()
    board.say(1, following=2)
    wait_until(lambda: seen(versions) == (1, 1, 2))
    board.say(1)
    wait_until(lambda: loads.closed == ["/2"])
    assert seen(versions) == (1, 1, 1)


def test_a_trunk_that_cannot_be_loaded_is_told_and_the_old_one_stays(board, loads, make) -> None:
    loads.torn = {"/2"}
    versions = make()
    board.say(1, following=2)
    wait_until(lambda: versions.in_use().failed == 2)
    assert versions.in_use().problem == "/2 is torn" and seen(versions) == (1, 1, 1)
    board.say(1)
    wait_until(lambda: versions.in_use().failed == 0)
    board.say(1, following=3)
    wait_until(lambda: seen(versions) == (1, 1, 3))
    assert versions.in_use().problem == ""


def test_a_router_that_was_left_out_tries_again_until_it_has_what_is_served(board, loads, make, monkeypatch) -> None:
    monkeypatch.setattr("moecluster.router.model_versions.RETRY_S", 0.05)
    loads.torn = {"/2"}
    versions = make()
    board.say(1)
    versions.use().release()
    board.say(2)
    wait_until(lambda: versions.in_use().failed == 2)
    assert versions.use().version == 1
    loads.torn = set()
    wait_until(lambda: seen(versions)[0] == 2)


def test_a_version_that_requests_are_written_with_is_taken_back_without_loading(board, loads, make) -> None:
    versions = make()
    board.say(1, following=2)
    wait_until(lambda: seen(versions)[2] == 2)
    with versions.use():
        board.say(2)
        wait_until(lambda: seen(versions) == (2, 1, 2))
        with versions.use():
            board.say(1, following=2)  # a successor that does not know that version 2 was published
            wait_until(lambda: seen(versions)[0] == 1)
            board.say(2)
            wait_until(lambda: seen(versions)[0] == 2)
    assert loads.loaded == ["/1", "/2"]


def test_requests_are_begun_while_a_trunk_is_loaded(board, loads, make) -> None:
    versions = make()
    board.say(1)
    versions.use().release()
    loads.go.clear()
    board.say(1, following=2)
    for _ in range(10):
        versions.use(0.1).release()
        time.sleep(0.01)
    assert seen(versions) == (1, 1, 1)
    loads.go.set()
    wait_until(lambda: seen(versions)[2] == 2)


def test_a_reload_keeps_the_version(board, loads, make) -> None:
    versions = make()
    board.say(1)
    with versions.use() as old:
        versions.reload("/trained")
        assert versions.current == (Path("/trained"), "/trained") and old.model == "/1"
        assert seen(versions) == (1, 1, 1)
    wait_until(lambda: loads.closed == ["/1"])
    loads.torn = {"/gone"}
    with pytest.raises(CheckpointError, match="/gone is torn"):
        versions.reload("/gone")
    assert versions.use().model == "/trained"

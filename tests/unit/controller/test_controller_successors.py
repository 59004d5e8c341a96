"""A controller that succeeds another one, and a deposed controller."""

import threading
import time

import pytest

from moecluster.errors import StaleRequest
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import ExpertId
from tests.support.clusters.controllers import ACTORS, wait_for_placement
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.waiting import WAIT_S, wait_until


def test_a_successor_keeps_what_is_loaded_and_reads_the_snapshot_back(make, actors, tmp_path) -> None:
    newer = save_tiny_model(tmp_path / "newer", seed=1)
    first = make()
    first.start(WAIT_S)
    first.set_checkpoint(newer)
    number = first.current(0.0).number
    wait_until(lambda: all(s.status().placement == number for s in actors.services.values()))
    first.close()
    loads = list(actors.loads)

    second = make()
    second.start(WAIT_S)
    assert second.current(0.0).number == (2, number[1] + 1)
    assert second.status().checkpoint == newer
    assert actors.loads == loads


def test_what_a_successor_does_not_know_of_serves_on_until_routers_know_better(make, actors, checkpoint) -> None:
    """Its predecessor died between a move and its snapshot: routers use the placement after the move."""
    first = make()
    first.start(WAIT_S)
    number = first.current(0.0).number
    wait_until(lambda: all(s.status().placement == number for s in actors.services.values()))
    first.close()
    moved = ExpertId(layer=0, index=0)
    actors.services["expert-1"].load(LoadRequest(term=1, experts=(moved,), checkpoint=checkpoint))
    actors.services["expert-0"].unload(term=1, experts=[moved])

    second = make(lease_s=0.5)
    second.start(WAIT_S)
    assert moved in actors.services["expert-0"].status().experts, "the snapshot says so"
    assert moved in actors.services["expert-1"].status().experts, "routers may not know yet"
    wait_until(lambda: moved not in actors.services["expert-1"].status().experts)


def test_a_successor_waits_for_no_actor_that_is_down(make, actors) -> None:
    first = make()
    first.start(WAIT_S)
    number = first.current(0.0).number
    wait_until(lambda: all(s.status().placement == number for s in actors.services.values()))
    first.close()
    actors.kill("expert-1")
    second = make(start_timeout_s=WAIT_S)
    began_s = time.monotonic()
    second.start(WAIT_S)
    assert set(second.current(0.0).actors) == {"expert-0"}
    assert time.monotonic() - began_s < WAIT_S / 2
    actors.revive("expert-1")
    wait_for_placement(second, lambda p: set(p.actors) == set(ACTORS))


def test_a_successor_that_finds_every_actor_down_waits_for_them(make, actors) -> None:
    first = make()
    first.start(WAIT_S)
    actors.kill("expert-0")
    number = first.current(0.0).number
    wait_until(lambda: actors.services["expert-1"].status().placement >= number)
    first.close()
    second = make()
    threading.Timer(0.5, lambda: actors.kill("expert-1")).start()
    second.start(WAIT_S)
    actors.revive("expert-0")
    actors.revive("expert-1")
    assert set(wait_for_placement(second, lambda p: set(p.actors) == set(ACTORS)).actors) == set(ACTORS)


def test_a_deposed_controller_is_refused_and_says_so(make, actors, tmp_path) -> None:
    deposed = threading.Event()
    first = make(on_deposed=deposed.set)
    first.start(WAIT_S)
    second = make()
    second.start(WAIT_S)
    first.set_checkpoint(save_tiny_model(tmp_path / "newer", seed=1))  # makes it send a request
    assert deposed.wait(WAIT_S)
    wait_until(lambda: all(s.status().placement[0] == 2 for s in actors.services.values()))
    assert {s.status().checkpoint for s in actors.services.values()} == {second.status().checkpoint}
    with pytest.raises(StaleRequest):
        actors.services["expert-0"].unload(term=1, experts=[ExpertId(layer=0, index=0)])

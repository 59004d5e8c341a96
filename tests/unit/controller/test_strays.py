"""Actors that exist and do not belong to the cluster are ended, but never upon an answer that may be old or wrong."""

from collections.abc import Iterator

import pytest

from moecluster.controller.actors.strays import LOOKS, Strays
from moecluster.controller.context import ControllerContext, new_context
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.errors import Unavailable
from moecluster.metrics import Metrics
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import WeightVersion
from tests.support.clusters.fake_actors import FakeActors

AFTER_S = 20.0
STRAY = "expert-7"


class Clock:
    """Seconds that the test sets."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def actors() -> Iterator[FakeActors]:
    with FakeActors(("expert-0", STRAY)) as fakes:
        yield fakes


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def context(clock: Clock, actors: FakeActors) -> ControllerContext:
    context = new_context({0: 2}, lease_s=10.0, board=PlacementBoard(), metrics=Metrics(model="tiny"), clock=clock)
    versions = WeightVersions.only(WeightVersion(version=1, checkpoint="/first"))
    context.state.begin(term=1, generation=0, versions=versions, actors=("expert-0",), replicas=())
    address = actors.address_of("expert-0", 0.0)
    assert address is not None
    context.state.actor_up(address, ())
    return context


def look(strays: Strays, clock: Clock, times: int) -> None:
    for _ in range(times):
        clock.now_s += AFTER_S / LOOKS
        strays.end()


def test_a_stray_is_ended_after_it_was_seen_for_long_and_no_member_is(context, actors, clock) -> None:
    strays = Strays(context, supervisor=actors, after_s=AFTER_S)
    look(strays, clock, LOOKS)
    assert set(actors.services) == {"expert-0", STRAY}
    look(strays, clock, 1)
    assert set(actors.services) == {"expert-0"}


def test_one_long_pause_between_two_looks_ends_nobody(context, actors, clock) -> None:
    strays = Strays(context, supervisor=actors, after_s=AFTER_S)
    look(strays, clock, 1)
    clock.now_s += 10 * AFTER_S  # the process was stopped: it may have been replaced meanwhile
    strays.end()
    assert STRAY in actors.services


def test_an_actor_that_joins_meanwhile_is_no_stray(context, actors, clock) -> None:
    strays = Strays(context, supervisor=actors, after_s=AFTER_S)
    look(strays, clock, LOOKS)
    context.state.add_actor(STRAY)
    look(strays, clock, 3 * LOOKS)
    assert STRAY in actors.services


@pytest.mark.parametrize("wrong", [(), (STRAY,), Unavailable("Ray is away")])
def test_without_an_answer_that_names_members_nobody_is_ended_and_the_wait_begins_anew(
    context, actors, clock, wrong
) -> None:
    strays = Strays(context, supervisor=actors, after_s=AFTER_S)
    look(strays, clock, LOOKS)
    if isinstance(wrong, Unavailable):
        actors.silence = wrong
    else:
        actors.shown = wrong
    look(strays, clock, 3 * LOOKS)
    actors.silence = actors.shown = None
    look(strays, clock, LOOKS)
    assert STRAY in actors.services
    look(strays, clock, 1)
    assert STRAY not in actors.services


def test_a_controller_without_an_actor_that_serves_ends_nobody(context, actors, clock) -> None:
    context.state.actor_down("expert-0")
    look(Strays(context, supervisor=actors, after_s=AFTER_S), clock, 3 * LOOKS)
    assert STRAY in actors.services

import threading
import time
from dataclasses import replace

from moecluster.controller.state.router_leases import Leases
from moecluster.types import NO_PLACEMENT, PlacementNumber, RouterState


def test_a_router_counts_while_its_lease_lasts() -> None:
    now_s = [0.0]
    leases = Leases(10.0, clock=lambda: now_s[0])
    leases.renew("one", PlacementNumber(1, 1), hold=False)
    now_s[0] = 6.0
    leases.renew("two", PlacementNumber(1, 2), hold=False)
    now_s[0] = 11.0
    assert {name: lease.applied for name, lease in leases.current().items()} == {"two": (1, 2)}


def test_routers_are_settled_a_lease_after_the_first_placement() -> None:
    now_s = [0.0]
    leases = Leases(10.0, clock=lambda: now_s[0])
    now_s[0] = 100.0
    assert not leases.settled(), "no placement is published yet"
    leases.opened()
    now_s[0] = 109.0
    assert not leases.settled()
    now_s[0] = 110.0
    assert leases.settled()


def test_a_hold_begins_and_ends_once_and_with_the_lease() -> None:
    now_s = [0.0]
    leases = Leases(10.0, clock=lambda: now_s[0])
    assert leases.renew("trainer", PlacementNumber(1, 1), hold=True)
    assert not leases.renew("trainer", PlacementNumber(1, 1), hold=True)
    assert leases.any_hold()
    assert leases.renew("trainer", PlacementNumber(1, 1), hold=False)
    leases.renew("trainer", PlacementNumber(1, 1), hold=True)
    now_s[0] = 20.0
    assert not leases.any_hold(), "a trainer that died holds nothing"


def test_waits_until_every_router_has_applied_the_placement() -> None:
    leases = Leases(10.0)
    leases.renew("one", PlacementNumber(1, 5), hold=False)
    leases.renew("two", PlacementNumber(1, 4), hold=False)
    assert not leases.wait_applied(PlacementNumber(1, 5), 0.01)
    threading.Timer(0.05, lambda: leases.renew("two", PlacementNumber(1, 6), hold=False)).start()
    assert leases.wait_applied(PlacementNumber(1, 5), 10.0)


def test_a_router_whose_lease_ends_is_not_waited_for() -> None:
    leases = Leases(0.1)
    leases.renew("gone", PlacementNumber(1, 1), hold=False)
    began_s = time.monotonic()
    assert leases.wait_applied(PlacementNumber(1, 2), 10.0)
    assert time.monotonic() - began_s < 5.0


def test_a_lease_keeps_what_the_router_says_of_itself() -> None:
    leases = Leases(10.0)
    leases.renew("one", PlacementNumber(1, 1), hold=False)
    assert leases.current()["one"].state == RouterState(router="one")
    state = RouterState(router="one", running=3, weight_version=2, oldest_weight_version=1, ready_weight_version=2)
    assert leases.renew("one", PlacementNumber(1, 1), hold=False, state=state), "it uses other weights than before"
    assert not leases.renew("one", PlacementNumber(1, 1), hold=False, state=replace(state, running=4))
    assert leases.current()["one"].state.running == 4
    assert leases.renew("one", PlacementNumber(1, 1), hold=False, state=replace(state, oldest_weight_version=2))


def test_a_router_stands_as_it_told_last_until_its_lease_ends() -> None:
    now_s = [0.0]
    leases = Leases(10.0, clock=lambda: now_s[0])
    first_incarnation = RouterState(router="router-1", address="a:1", running=2, waiting=1)
    leases.renew("router-1", PlacementNumber(1, 1), state=first_incarnation)
    leases.renew("router", PlacementNumber(1, 1))
    assert list(leases.states().values()) == [RouterState(router="router"), first_incarnation]
    now_s[0] = 6.0
    new_incarnation = RouterState(router="router-1", address="a:2")
    leases.renew("router-1", NO_PLACEMENT, state=new_incarnation)
    assert leases.states()["router-1"] == new_incarnation, "of the old incarnation nothing is left"
    now_s[0] = 12.0
    assert list(leases.states()) == ["router-1"]


def test_a_router_that_was_ended_is_waited_for_no_more() -> None:
    leases = Leases(10.0)
    leases.renew("router-1", PlacementNumber(1, 1))
    threading.Timer(0.05, lambda: leases.drop("router-1")).start()
    began_s = time.monotonic()
    assert leases.wait_applied(PlacementNumber(1, 2), 10.0)
    assert time.monotonic() - began_s < 5.0 and not leases.states()
    leases.drop("router-1")


def test_a_router_is_known_beyond_its_lease_unless_it_was_ended() -> None:
    now_s = [0.0]
    leases = Leases(10.0, clock=lambda: now_s[0])
    leases.renew("silent", PlacementNumber(1, 1))
    leases.renew("ended", PlacementNumber(1, 1))
    leases.drop("ended")
    now_s[0] = 30.0
    assert leases.current() == {} and leases.heard(15.0) == {}
    assert set(leases.heard(25.0)) == {"silent"}


def test_of_a_router_that_came_back_or_was_ended_it_is_known_what_its_last_incarnation_did() -> None:
    now_s = [0.0]
    leases = Leases(10.0, clock=lambda: now_s[0])
    for name in ("again", "moved", "ended"):
        state = RouterState(router=name, address="a:1", weight_version=2, oldest_weight_version=1)
        leases.renew(name, PlacementNumber(1, 1), state=state)
        leases.renew(name, PlacementNumber(1, 2), state=state)
    assert leases.heard_before(20.0) == ()
    now_s[0] = 4.0
    leases.renew("again", NO_PLACEMENT, state=RouterState(router="again"))
    leases.renew(
        "again", PlacementNumber(1, 2), state=RouterState(router="again", weight_version=2, oldest_weight_version=2)
    )
    leases.renew("moved", PlacementNumber(1, 2), state=RouterState(router="moved", address="a:2", weight_version=2))
    leases.drop("ended")
    now_s[0] = 29.0
    before = leases.heard_before(20.0)
    assert [(lease.state.router, lease.applied) for lease in before] == [
        ("again", (1, 2)), ("moved", (1, 2)), ("ended", (1, 2)),
    ]  # fmt: skip
    assert {lease.state.oldest_weight_version for lease in before} == {1}
    now_s[0] = 30.0
    assert leases.heard_before(20.0) == ()

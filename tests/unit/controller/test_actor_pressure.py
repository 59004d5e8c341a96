"""The utilization of actors from their reports: an actor that is silent is not idle."""

from dataclasses import replace

import pytest

from moecluster.controller.load.reports import ActorReports, Pressure
from moecluster.types import ActorWork, ExpertActorStatus, PlacementNumber

STATUS = ExpertActorStatus(
    actor="expert-0", incarnation="a", placement=PlacementNumber(1, 1), experts=(), hosted_bytes=0, weight_version=1,
    training_term=0, committed=None, prepared=None, rss_bytes=1,
)  # fmt: skip
ACTORS = ("expert-0", "expert-1")


class Reports:
    """Reports at given times, and the pressure on both actors."""

    def __init__(self) -> None:
        self.reports = ActorReports()

    def report(self, actor: str, now_s: float, busy_s: float, waited_s: float = 0.0, incarnation: str = "a") -> None:
        work = ActorWork(busy_s=busy_s, batches=int(now_s), queue_wait_s=waited_s)
        self.reports.add(replace(STATUS, actor=actor, incarnation=incarnation, work=work), now_s)

    def pressure(self, now_s: float) -> Pressure:
        return self.reports.pressure(ACTORS, now_s=now_s, max_age_s=5.0)


def test_the_busy_share_is_the_mean_over_the_actors_between_their_reports() -> None:
    reports = Reports()
    for actor in ACTORS:
        reports.report(actor, 1.0, 0.0)
    assert reports.pressure(1.0) == Pressure(busy_share=0.0, queue_s=0.0, silent=2), "one report is no interval"
    reports.report("expert-0", 3.0, 1.0, waited_s=0.4)
    reports.report("expert-1", 3.0, 2.0)
    found = reports.pressure(3.0)
    assert found.silent == 0 and found.busy_share == pytest.approx(0.75)
    assert found.queue_s == pytest.approx(0.1), "0.4 s over 4 messages"


def test_between_two_reports_the_last_interval_still_holds() -> None:
    reports = Reports()
    for actor in ACTORS:
        reports.report(actor, 1.0, 0.0)
    reports.pressure(1.0)
    for actor in ACTORS:
        reports.report(actor, 3.0, 1.0)
    assert reports.pressure(3.0) == reports.pressure(3.5) == reports.pressure(7.9)


def test_an_actor_that_has_not_reported_lately_is_silent_and_not_idle() -> None:
    reports = Reports()
    for now_s in (1.0, 3.0):
        for actor in ACTORS:
            reports.report(actor, now_s, now_s)
        reports.pressure(now_s)
    reports.report("expert-0", 9.0, 9.0)
    found = reports.pressure(9.0)
    assert found.silent == 1 and found.busy_share == pytest.approx(1.0)
    assert reports.pressure(20.0) == Pressure(busy_share=0.0, queue_s=0.0, silent=2)


def test_a_new_incarnation_is_silent_until_its_second_report() -> None:
    reports = Reports()
    for now_s in (1.0, 3.0):
        for actor in ACTORS:
            reports.report(actor, now_s, now_s)
        reports.pressure(now_s)
    reports.report("expert-0", 4.0, 0.0, incarnation="b")
    assert reports.pressure(4.0).silent == 1
    reports.report("expert-0", 5.0, 0.5, incarnation="b")
    found = reports.pressure(5.0)
    assert found.silent == 0 and found.busy_share == pytest.approx(0.75)


def test_an_actor_that_was_forgotten_is_silent() -> None:
    reports = Reports()
    for now_s in (1.0, 3.0):
        for actor in ACTORS:
            reports.report(actor, now_s, 0.0)
        reports.pressure(now_s)
    reports.reports.forget("expert-1")
    assert reports.pressure(3.0).silent == 1

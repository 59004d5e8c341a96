"""What Ray says of its cluster: now and whole, or not at all."""

import threading
from typing import Any

import pytest
from ray.exceptions import RaySystemError

from actors import supervisor as supervisor_module
from actors.fresh_answers import FreshAnswers
from actors.names import CONTROLLER, HEAD_RESOURCE, metrics_port, options
from actors.supervisor import RaySupervisor
from moecluster.config import read_config
from moecluster.errors import Unavailable
from tests.support.waiting import WAIT_S, wait_until


@pytest.mark.parametrize("error", [RaySystemError("the control store is away\nno route"), RuntimeError("no route")])
def test_an_error_of_ray_is_no_answer(error: Exception) -> None:
    def ask() -> Any:
        raise error

    with pytest.raises(Unavailable, match=r"Ray does not say which actors there are: .*no route$"):
        FreshAnswers(ask, "which actors there are", max_age_s=WAIT_S).get()


def test_an_answer_that_comes_late_is_used_by_nobody_and_asked_for_again() -> None:
    answers: list[int] = []
    go_on = threading.Event()

    def ask() -> int:
        answers.append(len(answers))
        if len(answers) == 1:
            go_on.wait(WAIT_S)
        return answers[-1]

    question = FreshAnswers(ask, "which actors there are", max_age_s=0.2)
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"within 0\.2 s"):
            question.get()
    assert len(answers) == 1, "one question at a time"
    go_on.set()

    def answered() -> bool:
        try:
            return question.get() > 0
        except Unavailable:
            return False

    wait_until(answered)


@pytest.mark.parametrize("listed", [[], ["expert-0", "router"]])
def test_a_list_without_the_controller_that_asks_is_not_complete(monkeypatch: pytest.MonkeyPatch, listed) -> None:
    supervisor = object.__new__(RaySupervisor)
    monkeypatch.setattr(supervisor, "_namespace", "one", raising=False)
    found = list(listed)
    answers = FreshAnswers(lambda: found, "which actors there are", max_age_s=WAIT_S)
    monkeypatch.setattr(supervisor, "_actors", answers, raising=False)
    for look in (supervisor.known, supervisor.existing_routers):
        with pytest.raises(Unavailable, match="not complete"):
            look()
    found[:] = [CONTROLLER, "expert-0", "router", "checkpoint-source"]
    assert supervisor.known() == ("expert-0",) and supervisor.existing_routers() == ("router",)


def test_a_request_that_ray_does_not_take_is_no_bug_and_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RaySystemError("the control store is away")

    monkeypatch.setattr(supervisor_module, "spawn", refuse)
    supervisor = object.__new__(RaySupervisor)
    monkeypatch.setattr(supervisor, "_config", read_config({}), raising=False)
    monkeypatch.setattr(supervisor, "_credentials", None, raising=False)
    with pytest.raises(Unavailable, match=r"Ray does not take the request for expert-9: .*away$"):
        supervisor.create("expert-9")
    with pytest.raises(Unavailable, match="Ray does not take the request for router-9"):
        supervisor.create_router("router-9", "/model")


def test_the_controller_alone_is_bound_to_ray_s_head() -> None:
    config = read_config({})
    assert options(config, "controller")["resources"] == {HEAD_RESOURCE: 0.001}
    assert all(options(config, role)["resources"] == {} for role in ("expert", "router", "source"))


def test_what_replaces_a_leaving_actor_beyond_the_limit_takes_nobody_s_port() -> None:
    config = read_config(
        {
            "cluster": {"num_expert_actors": 1, "metrics_port": 9000},
            "serve": {"max_routers": 2},
            "controller": {"max_expert_actors": 2},
        }
    )
    ports = [metrics_port(config, name) for name in ("router", "router-1", "expert-0", "expert-1")]
    assert len(set(ports)) == 4
    assert metrics_port(config, "router-2") == metrics_port(config, "expert-2") == 0

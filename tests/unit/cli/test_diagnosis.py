"""The problems that `status` reports, and the commands that it suggests."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from actors import cluster_file
from actors.local_ray import LocalRay, RayProcess
from actors.names import Endpoints
from moecluster.cli.commands import serve as serving
from moecluster.cli.commands.serve import ServedCluster
from moecluster.cli.common.diagnosis import Diagnosis, of_actors, of_local_ray
from moecluster.errors import ClusterEnded
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.types import ActorPhase, ActorState, ControllerStatus, RouterState

RAY = LocalRay(address="127.0.0.1:6379", mark="m", folder="/tmp/ray", auth="token")
PARTS = ("gcs_server", "raylet", "ray::ExpertActor", "ray::RouterActor")
WELL = [RayProcess(pid=100 + i, part=part, stopped=False) for i, part in enumerate(PARTS)]
ACTOR = ActorState(actor="expert-0", address="a:1", incarnation="i", phase=ActorPhase.SERVING, experts=8, restarts=0)
SEEN = ControllerStatus(term=1, generation=2, actors=(ACTOR,), checkpoint="/m", routers=1)


def processes(*, without: str = "", stopped: Sequence[str] = ()) -> list[RayProcess]:
    return [replace(p, stopped=p.part in stopped) for p in WELL if p.part != without]


def test_a_ray_whose_parts_all_run_is_well() -> None:
    found = of_local_ray(RAY, processes(), "one")
    assert found == Diagnosis() and found.status == "ready"


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_ray_without_a_part_that_it_cannot_be_without_has_ended(part: str) -> None:
    found = of_local_ray(RAY, processes(without=part), "one")
    assert found.ended and found.status == "ended"
    assert found.problems[0].startswith(f"Ray's {part} has ended")
    assert "moecluster down --name one" in found.problems[0] and "moecluster up" in found.problems[0]


@pytest.mark.parametrize("part", PARTS)
def test_a_stopped_process_is_named_with_what_lets_it_go_on(part: str) -> None:
    found = of_local_ray(RAY, processes(stopped=[part]), "one")
    pid = 100 + PARTS.index(part)
    assert found.problems == (f"{part} (process {pid}) is stopped, and does not answer: kill -CONT {pid}",)
    assert found.status == "degraded"


def test_what_the_controller_says_is_wrong_is_said() -> None:
    loading = replace(ACTOR, phase=ActorPhase.LOADING, problem="/m: no such directory")
    router = RouterState(router="router", problem="no trunk")
    found = of_actors({}, replace(SEEN, actors=(loading,), lost_experts=8, router_states=(router,)), "a:2")
    assert found.problems == (
        "expert-0 is loading: /m: no such directory",
        "router: no trunk",
        "8 experts have no serving replica: requests that need them wait or fail",
    )
    assert of_actors({}, SEEN, "a:2") == Diagnosis()


def test_a_silent_controller_is_said() -> None:
    assert "no controller answers at a:2" in of_actors({}, None, "a:2").problems[0]


def test_actors_that_give_way_to_other_programs_are_said() -> None:
    at = {
        name: Endpoints(actor=name, pid=1, address="a:1", metrics_address="", nice=15)
        for name in ("expert-0", "router")
    }
    assert "expert-0, router give way" in of_actors(at, SEEN, "a:2").problems[0]
    assert "RAY_worker_niceness=0" in of_actors(at, SEEN, "a:2").problems[0]


def test_a_cluster_of_serve_that_has_ended_is_brought_up_again_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(cluster: str) -> ClusterAddresses:
        raise ClusterEnded("Ray's raylet has ended")

    begun: list[int] = []
    there = ClusterAddresses(routers=("127.0.0.1:1",))
    monkeypatch.setattr(serving, "ask_ray", lost)
    monkeypatch.setattr(serving, "_noted", lambda cluster: there)
    monkeypatch.setattr(cluster_file, "load", lambda name: None)
    own = ServedCluster("one", ("demo",), restarts=2, ending=lambda: False)

    def bring_up() -> int:
        begun.append(1)
        return 0

    monkeypatch.setattr(own, "bring_up", bring_up)
    assert own.find() == own.find() == there
    with pytest.raises(ClusterEnded, match="Ray's raylet has ended"):
        own.find()
    assert len(begun) == 2
    own = ServedCluster("one", ("demo",), restarts=2, ending=lambda: False)
    monkeypatch.setattr(own, "bring_up", lambda: 2)
    with pytest.raises(ClusterEnded, match=r"could not be brought up again \(exit code 2\)"):
        own.find()

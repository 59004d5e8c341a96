"""Events between a load request and its execution by an expert actor, over real gRPC."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecluster.controller.actors.manager import ActorManager
from moecluster.errors import Unavailable
from moecluster.expert.loader import ExpertLoader
from moecluster.types import ExpertId
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.models.weight_versions import done, save_version
from tests.support.waiting import wait_until


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return save_tiny_model(tmp_path)


def before_each_load(monkeypatch: pytest.MonkeyPatch, happens: Callable[[Any], None]) -> None:
    """Calls `happens` with the load request whose turn has come, before any expert is read."""
    load = ExpertLoader.load

    def load_later(self: ExpertLoader, order: Any, settings: Any) -> int:
        happens(settings)
        return load(self, order, settings)

    monkeypatch.setattr(ExpertLoader, "load", load_later)


def test_experts_that_are_unloaded_amid_the_load_of_a_new_incarnation_are_loaded_again(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackCluster(checkpoint, num_actors=2) as cluster:
        expected = set(cluster.services["expert-1"].status().experts)
        term = cluster.controller.status().term
        unloaded: list[ExpertId] = []

        def unload_one(settings: Any) -> None:
            if not unloaded:
                unloaded.append(settings.experts[0])
                cluster.services["expert-1"].unload(term=term, experts=unloaded)

        cluster.kill("expert-1")
        before_each_load(monkeypatch, unload_one)
        cluster.revive("expert-1")
        wait_until(lambda: "expert-1" in cluster.controller.current(0.0).actors, "expert-1 serves again")
        wait_until(lambda: set(cluster.services["expert-1"].status().experts) == expected, "all experts are back")
        assert unloaded and cluster.controller.status().term == term


def test_an_actor_is_not_lost_with_the_source_that_it_reads_the_next_weights_from(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackCluster(checkpoint, num_actors=2) as cluster:
        restarts = {state.actor: state.restarts for state in cluster.controller.status().actors}
        away = 3

        def source_is_away(settings: Any) -> None:
            nonlocal away
            if settings.weight_version > 1 and away:
                away -= 1
                raise Unavailable("the node that has the checkpoint is away")

        before_each_load(monkeypatch, source_is_away)
        lost: list[str] = []
        monkeypatch.setattr(ActorManager, "actor_down", lambda self, actor: lost.append(actor))
        done(cluster, cluster.controller.update(save_version(tmp_path / "next", seed=1)))
        assert not away and not lost
        assert {state.actor: state.restarts for state in cluster.controller.status().actors} == restarts

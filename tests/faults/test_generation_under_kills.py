"""Killing processes does not change the output of running requests."""

from collections.abc import Iterator

import pytest

from tests.support.clusters.ray_cluster import RayCluster
from tests.support.clusters.ray_session import RaySession
from tests.support.soak.generation_load import (
    PROMPTS,
    assert_undisturbed,
    generate,
    generate_under_kills,
    save_decided_model,
)

DURATION_S = 20.0  # tests/soak has the long form
KILL_EVERY_S = 7.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decided_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(ray_session: RaySession, directory: str) -> Iterator[RayCluster]:
    with RayCluster(directory, {"cluster": {"num_expert_actors": 2}}) as running:
        yield running


@pytest.mark.timeout(240)
def test_no_request_fails_and_every_request_is_the_same_while_actors_are_killed(
    cluster: RayCluster, directory: str
) -> None:
    undisturbed = {prompt: generate(cluster, prompt).ids for prompt in PROMPTS}
    before = cluster.pids()
    assert len(set(undisturbed.values())) == len(PROMPTS)
    assert sum(map(len, undisturbed.values())) > 60 * len(PROMPTS)

    outcome = generate_under_kills(cluster, duration_s=DURATION_S, kill_every_s=KILL_EVERY_S)

    assert_undisturbed(outcome, undisturbed, directory)
    assert [actor for actor, _ in outcome.kills].count("controller") == 1 and len(outcome.kills) == 3
    cluster.wait_served()
    after = cluster.pids()
    assert {actor for actor in before if after[actor] != before[actor]} == {actor for actor, _ in outcome.kills}
    assert {prompt: generate(cluster, prompt).ids for prompt in PROMPTS} == undisturbed

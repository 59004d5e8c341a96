"""An hour, or as long as asked for, of texts under load while actors are killed: make soak SOAK_DURATION_S=3600."""

import os

from tests.generation_load import PROMPTS, assert_undisturbed, generate, generate_under_kills, save_decided_model
from tests.ray_cluster import RayCluster
from tests.ray_session import RaySession

DURATION_S = float(os.environ.get("MOECLUSTER_SOAK_DURATION_S", "60"))
KILL_EVERY_S = float(os.environ.get("MOECLUSTER_SOAK_KILL_EVERY_S", "10"))


def test_no_request_fails_and_every_text_is_the_same_while_actors_are_killed(
    ray_session: RaySession, tmp_path_factory
) -> None:
    directory = save_decided_model(tmp_path_factory.mktemp("model"))
    with RayCluster(directory, {"cluster": {"num_expert_actors": 4}}) as cluster:
        undisturbed = {prompt: generate(cluster, prompt).ids for prompt in PROMPTS}
        outcome = generate_under_kills(cluster, duration_s=DURATION_S, kill_every_s=KILL_EVERY_S)
        assert_undisturbed(outcome, undisturbed, directory)
        cluster.wait_served()
        assert {prompt: generate(cluster, prompt).ids for prompt in PROMPTS} == undisturbed

"""Running streams continue when an expert actor, a router or the controller is killed."""

from pathlib import Path

import pytest

from tests.support.clusters.ray_session import RaySession
from tests.support.soak.serving_under_kills import describe, serve_under_kills


@pytest.mark.timeout(300)
def test_no_request_fails_and_every_request_is_right_while_everything_is_killed(
    ray_session: RaySession, tmp_path: Path
) -> None:
    outcome = serve_under_kills(tmp_path, duration_s=30.0, kill_every_s=6.0, clients=12, seed=1)  # tests/soak: longer
    print(describe(outcome), outcome.kills)
    assert {actor.partition("-")[0] for actor, _ in outcome.kills} == {"expert", "router", "controller"}
    assert describe(outcome)["streams that a kill met"] > 0

"""All kinds of operations and kills of processes while requests run: the outputs do not change."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.support.clusters.ray_session import RaySession
from tests.support.soak.changes_soak import show, soak


@pytest.mark.timeout(300)
def test_no_request_fails_while_the_cluster_is_changed_and_killed(ray_session: RaySession, tmp_path: Path) -> None:
    found = soak(tmp_path, operations=7, kills=2, duration_s=23.0, seed=1)
    assert {h.kind for h in found.happened} >= {"kill expert", "kill controller"}
    assert sum(bool(h.amid) for h in found.happened) == 1
    show(found, Console())

"""Ten minutes, or as long as asked for, of texts under load while the cluster is changed in every way and its parts are
killed: make soak DURATION=600. The figures of a run of ten minutes or more are written to benchmarks/results."""

import os
from pathlib import Path

from rich.console import Console

from tests.support.clusters.ray_session import RaySession
from tests.support.soak.changes_soak import report, show, soak

DURATION_S = float(os.environ.get("MOECLUSTER_SOAK_DURATION_S", "60"))
FULL_S = 600.0
OPERATIONS, KILLS = 40, 20  # of a full run; of others in proportion
SEED = 0


def test_no_request_fails_and_no_request_is_wrong_whatever_is_changed_and_killed(
    ray_session: RaySession, tmp_path: Path
) -> None:
    part = DURATION_S / FULL_S
    found = soak(
        tmp_path, operations=round(OPERATIONS * part), kills=round(KILLS * part), duration_s=DURATION_S, seed=SEED
    )
    show(found, Console())
    if DURATION_S >= FULL_S:
        print(f"written to {report(found).write()}")

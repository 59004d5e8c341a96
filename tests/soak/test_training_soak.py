"""A long training run while expert actors are killed at random: its curve is the undisturbed one, bit for bit."""

import os
import random
import threading
from pathlib import Path
from typing import Any

from moecluster.training.events import StepDone, WentBack
from moecluster.training.setup import prepare_start
from tests.support.clusters.ray_cluster import RayCluster
from tests.support.clusters.ray_session import RaySession
from tests.support.training.ray_training import run_on
from tests.support.training.training_runs import losses, make_config, write_text

DURATION_S = float(os.environ.get("MOECLUSTER_SOAK_DURATION_S", "60"))
KILL_EVERY_S = float(os.environ.get("MOECLUSTER_SOAK_KILL_EVERY_S", "20"))
STEPS = 60  # of one run
CHECKPOINT_EVERY_STEPS = 5


def test_the_curve_is_the_same_whoever_is_killed_and_when(ray_session: RaySession, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    settings: dict[str, Any] = {
        "steps": STEPS,
        "checkpoint_every_steps": CHECKPOINT_EVERY_STEPS,
        "participant_timeout_s": 1.0,
    }
    start = prepare_start(make_config(text, tmp_path / "first", **settings))
    choose, over, kills = random.Random(0), threading.Event(), 0

    with RayCluster(start, {"cluster": {"num_expert_actors": 4}}) as cluster:
        experts = [actor.actor for actor in cluster.wait_served().actors]

        def kill_on() -> None:
            nonlocal kills
            while not over.wait(KILL_EVERY_S * (0.5 + choose.random())):
                cluster.kill(choose.choice(experts))
                kills += 1

        undisturbed = losses(run_on(cluster, make_config(text, tmp_path / "undisturbed", **settings)))
        killer = threading.Thread(target=kill_on, daemon=True)
        threading.Timer(DURATION_S, over.set).start()
        killer.start()
        runs, went_back = 0, 0
        while not over.is_set():
            events = run_on(cluster, make_config(text, tmp_path / f"run-{runs}", **settings))
            taken = [event for event in events if isinstance(event, StepDone)]
            assert losses(events) == undisturbed
            assert all(step.total_loss == undisturbed[step.step] for step in taken)
            went_back += sum(isinstance(event, WentBack) for event in events)
            runs += 1
        killer.join(60.0)
    print(f"{runs} runs of {STEPS} steps, {kills} kills, went back {went_back} times")
    assert kills and went_back

"""Training over four Ray expert actors equals one process, with the same curve if an actor is killed in any phase.

The rank runs in the test's process, so that a message of the chosen phase can trigger the SIGKILL.
"""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.names import ROUTER
from moecluster.cli.commands.train import run_in
from moecluster.rpc.controller.client import set_checkpoint
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.training.checkpoint_store import CHECKPOINTS, CheckpointStore
from moecluster.training.events import StepDone, WentBack
from moecluster.training.history import History
from moecluster.training.setup import prepare_start
from moecluster.types import ComputeBatch, ComputeResult, Phase
from tests.support.clusters.ray_cluster import CREDENTIALS, RayCluster, wait_for_result
from tests.support.clusters.ray_session import RaySession
from tests.support.training.ray_training import run_on
from tests.support.training.training_runs import (
    assert_equal_within,
    losses,
    losses_in_one_process,
    make_config,
    write_text,
)

TOLERANCE = 1e-5
VICTIM = "expert-2"
MESSAGES = {Phase.TRAIN_FORWARD: "train_forward", Phase.BACKWARD: "backward"}
PHASES = (*MESSAGES.values(), "reduce", "prepare", "commit")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cluster(ray_session: RaySession, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    start = prepare_start(make_config(text, tmp_path_factory.mktemp("first")))
    with RayCluster(start, {"cluster": {"num_expert_actors": 4}}) as running:
        yield running


class Killer:
    """Kills the victim's process at its call number `at` of a phase: before the call is sent, or after its reply."""

    def __init__(self, pid: int, phase: str, *, at: int, after: bool) -> None:
        self._pid, self._phase, self._at, self._after = pid, phase, at, after
        self._calls = 0
        self.struck = False

    def around(self, phase: str, call: Callable[[], Any]) -> Any:
        if phase != self._phase or self.struck:
            return call()
        self._calls += 1
        if self._calls != self._at:
            return call()
        self.struck = True
        if self._after:
            answer = call()
            os.kill(self._pid, signal.SIGKILL)
            return answer
        os.kill(self._pid, signal.SIGKILL)
        return call()

    def arm(self, patches: pytest.MonkeyPatch) -> None:
        """Watches the messages and requests that go to the victim."""
        really_submit = GrpcExpertTransport.submit

        def submit(transport: GrpcExpertTransport, batch: ComputeBatch) -> "Future[ComputeResult]":
            if transport.actor != VICTIM:
                return really_submit(transport, batch)
            future: Future[ComputeResult] = self.around(
                MESSAGES.get(batch.phase, "forward"), lambda: really_submit(transport, batch)
            )
            return future

        patches.setattr(GrpcExpertTransport, "submit", submit)
        for request in PHASES[len(MESSAGES) :]:
            patches.setattr(GrpcExpertControl, request, self._watched(request))

    def _watched(self, request: str) -> Callable[..., Any]:
        really_send: Callable[..., Any] = getattr(GrpcExpertControl, request)

        def send(control: GrpcExpertControl, *args: Any, **kwargs: Any) -> Any:
            if control.name != VICTIM:
                return really_send(control, *args, **kwargs)
            return self.around(request, lambda: really_send(control, *args, **kwargs))

        return send


def test_fifty_steps_equal_one_process(cluster: RayCluster, text: Path, tmp_path: Path) -> None:
    config = make_config(text, tmp_path, steps=50, checkpoint_every_steps=0)
    expected = losses_in_one_process(config)
    assert_equal_within(losses(run_on(cluster, config)), expected, TOLERANCE)
    assert expected[50] < 0.5 * expected[1]


@pytest.fixture(scope="module")
def undisturbed(cluster: RayCluster, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return losses(run_on(cluster, make_config(text, tmp_path_factory.mktemp("undisturbed"), **SHORT)))


SHORT: dict[str, Any] = {"steps": 8, "checkpoint_every_steps": 3, "participant_timeout_s": 1.0}


@pytest.mark.parametrize("phase", PHASES)
def test_an_actor_killed_in_any_phase_leaves_the_curve_as_it_was(
    cluster: RayCluster,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[int, float],
    phase: str,
) -> None:
    chance = random.Random(f"killed in {phase}")
    cluster.wait_served()
    # Two micro-batches and two layers: four messages of each kind to the victim in a step, one order.
    calls_a_step = 4 if phase in ("train_forward", "backward") else 1
    at = calls_a_step * chance.randrange(3, 6) + chance.randrange(calls_a_step) + 1
    killer = Killer(cluster.pids()[VICTIM], phase, at=at, after=chance.random() < 0.5)
    killer.arm(monkeypatch)
    events = run_on(cluster, make_config(text, tmp_path, **SHORT))
    assert killer.struck
    assert [event for event in events if isinstance(event, WentBack)], "no state was lost"
    assert losses(events) == undisturbed  # bit for bit: gradients are summed in one order
    taken = [event for event in events if isinstance(event, StepDone)]
    assert len(taken) > len(undisturbed) and all(step.total_loss == undisturbed[step.step] for step in taken)


def test_a_run_whose_router_is_killed_begins_again_by_itself(
    cluster: RayCluster, text: Path, tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """As with `moecluster train`: it runs in the router's process, which is killed by SIGKILL after the first
    checkpoint."""
    cluster.wait_served()
    config = make_config(text, tmp_path, **SHORT)
    start = prepare_start(config)
    cluster.driver.give_directory(str(start))
    set_checkpoint(cluster.driver.controller_address(), str(start.resolve()), credentials=CREDENTIALS)
    store = CheckpointStore(tmp_path / CHECKPOINTS)

    def kill_behind_a_checkpoint() -> None:
        wait_for_result(lambda: len(store.steps()) > 1, "a checkpoint is written", timeout_s=120.0)
        cluster.kill(ROUTER)

    killer = threading.Thread(target=kill_behind_a_checkpoint)
    killer.start()
    console = Console(width=300)
    with console.capture() as output:
        last = run_in(cluster.driver, config, str(start.resolve()), CREDENTIALS, console)
    killer.join()
    assert "the run begins again from" in output.get()
    assert last is not None and Path(last).name == "step-00000008"
    assert {step: done.total_loss for step, done in History.open(tmp_path).steps.items()} == undisturbed

"""A training run in the router's process: it holds the placement for exactly as long as it runs, and restarts if its
process is lost."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.training_host import TrainingHost
from moecluster.cli.commands.train import run
from moecluster.config import Config
from moecluster.config.load import override
from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import (
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    MoeClusterError,
    NotGiven,
    StateLost,
    Unavailable,
    UserError,
)
from moecluster.metrics import Metrics
from moecluster.rpc.controller.in_process import FixedPlacement
from moecluster.rpc.router.training_messages import RunGone, RunProgress, StartRequest
from moecluster.training.events import Event, StepDone, decode_event
from moecluster.training.history import History
from moecluster.training.setup import prepare_start
from moecluster.types import Placement, Replica
from tests.support.clusters.expert_cluster import ExpertCluster, control_of
from tests.support.training.training_runs import assert_equal_within, losses_in_one_process, make_config, write_text
from tests.support.waiting import wait_until


class Watched(FixedPlacement):
    """Records the order of holds, reads, wants and releases. Wanting experts adds the `cold` replicas."""

    def __init__(self, placement: Placement, *, refuses: bool = False, cold: tuple[Replica, ...] = ()) -> None:
        super().__init__(replace(placement, replicas=tuple(r for r in placement.replicas if r not in cold)))
        self._cold = cold
        self._refuses = refuses
        self.calls: list[str] = []

    def current(self, timeout_s: float) -> Placement:
        self.calls.append("look")
        return super().current(timeout_s)

    def hold(self, timeout_s: float) -> None:
        self.calls.append("hold")
        if self._refuses:
            raise DeadlineExceeded(f"not within {timeout_s:g} s")

    def release(self) -> None:
        self.calls.append("release")

    def want_experts(self, layer: int, experts: object) -> None:
        self.calls.append("want")
        self._placement = replace(self._placement, replicas=(*self._placement.replicas, *self._cold))
        self._cold = ()


class Training:
    """A training host over two expert services, and the settings of a run."""

    def __init__(self, config: Config, cluster: ExpertCluster, start: Path) -> None:
        self.config, self.cluster, self.start = config, cluster, start
        self.not_given: tuple[str, ...] = ()
        self.served = ""  # by the cluster; empty: where the run starts

    def host(self, placements: Watched, metrics: Metrics | None = None) -> TrainingHost:
        pool = ExpertPool(
            placements,
            connect=self.cluster.connect,
            control=lambda address: control_of(self.cluster.services[address.actor]),
        )
        return TrainingHost(
            RemoteExperts(pool),
            placements,
            announce=lambda path: None,
            is_given=lambda path: path not in self.not_given,
            served=lambda: self.served or str(self.start),
            metrics=metrics or Metrics(model="m"),
        )

    def request(self, run_id: str = "first", *, start: str | None = None, **train: Any) -> StartRequest:
        """A run of the settings, from `start` (empty: the host chooses)."""
        settings = override(self.config.to_tables(), {f"train.{key}": value for key, value in train.items()})
        return StartRequest(run_id=run_id, settings=settings, start=str(self.start) if start is None else start)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    config = make_config(write_text(tmp_path), tmp_path / "run", steps=4)
    start = prepare_start(config)
    with ExpertCluster(start) as cluster:
        yield Training(config, cluster, start)


def ended(host: TrainingHost, run_id: str = "first") -> RunProgress:
    wait_until(lambda: host.progress(run_id, 0).ended, "the end of the run")
    return host.progress(run_id, 0)


def events_of(progress: RunProgress) -> list[Event]:
    return [decode_event(line) for line in progress.events]


def test_the_placement_is_held_before_it_is_read_until_all_is_handed_over(training: Training) -> None:
    placements = Watched(training.cluster.placement)
    host = training.host(placements)
    host.start(training.request())
    progress = ended(host)
    assert progress.error is None
    assert [event.step for event in events_of(progress) if isinstance(event, StepDone)] == [1, 2, 3, 4]
    assert host.progress("first", len(progress.events)).events == ()
    assert placements.calls[0] == "hold" and placements.calls[-1] == "release"
    assert set(placements.calls[1:-1]) == {"look"}


def test_experts_that_stand_nowhere_are_wanted_before_training_begins(training: Training) -> None:
    placements = Watched(training.cluster.placement, cold=training.cluster.placement.replicas[:1])
    host = training.host(placements)
    host.start(training.request())
    assert ended(host).error is None
    assert placements.calls.count("want") == 1


def test_a_run_that_is_stopped_releases_the_placement(training: Training) -> None:
    placements = Watched(training.cluster.placement)
    host = training.host(placements)
    host.start(training.request())
    with pytest.raises(UserError, match="under way"):
        host.start(training.request("second"))
    host.start(training.request())  # its answer was lost: it has begun
    host.stop("second")
    assert not host.progress("first", 0).ended
    host.stop("first")
    assert ended(host).error is None
    assert placements.calls.count("hold") == placements.calls.count("release") == 1


def test_a_run_that_fails_releases_the_placement(training: Training, tmp_path: Path) -> None:
    placements = Watched(training.cluster.placement)
    host = training.host(placements)
    host.start(training.request(start=str(tmp_path / "nothing")))
    assert isinstance(ended(host).error, CheckpointError)
    assert placements.calls[0] == "hold" and placements.calls[-1] == "release"
    host.start(training.request("second"))
    assert ended(host, "second").error is None


def test_without_a_hold_nothing_is_trained(training: Training) -> None:
    placements = Watched(training.cluster.placement, refuses=True)
    host = training.host(placements)
    host.start(training.request())
    progress = ended(host)
    assert isinstance(progress.error, DeadlineExceeded) and progress.events == ()
    assert placements.calls == ["hold"]


def test_progress_of_a_run_that_another_incarnation_began_is_no_success(training: Training) -> None:
    host = training.host(Watched(training.cluster.placement))
    with pytest.raises(RunGone, match="its training run is gone"):
        host.progress("first", 0)
    host.start(training.request())
    assert ended(host).error is None
    with pytest.raises(RunGone):
        host.progress("another", 0)


def test_a_run_that_chooses_its_start_goes_on_from_its_last_checkpoint(training: Training) -> None:
    host = training.host(Watched(training.cluster.placement))
    host.start(training.request(start="", steps=2))
    assert ended(host).error is None, "from the fresh model, which the cluster serves"
    host.start(training.request("second", start=""))
    assert "set train.resume = true" in str(ended(host, "second").error)
    host.start(training.request("third", start="", resume=True))
    steps = [event.step for event in events_of(ended(host, "third")) if isinstance(event, StepDone)]
    assert steps == [3, 4]


def test_a_run_of_another_model_than_the_cluster_serves_is_refused(training: Training) -> None:
    training.served = "/models/other"
    placements = Watched(training.cluster.placement)
    host = training.host(placements)
    host.start(training.request(start=""))
    progress = ended(host)
    assert isinstance(progress.error, UserError) and "the cluster serves /models/other" in str(progress.error)
    assert progress.events == () and placements.calls == []


def test_a_run_reads_and_writes_only_what_the_cluster_was_given(training: Training, tmp_path: Path) -> None:
    host = training.host(Watched(training.cluster.placement))
    for name in ("data", "output_dir", "tokenizer"):
        training.not_given = (path := str(tmp_path / "not" / "given"),)
        with pytest.raises(NotGiven, match=f"{path}: the cluster was not given this directory"):
            host.start(training.request(**{name: path}))
        with pytest.raises(ConfigError, match=rf"train\.{name}: got here, expected an absolute path"):
            host.start(training.request(**{name: "here"}))
    with pytest.raises(ConfigError, match="start: got here"):
        host.start(training.request(start="here"))
    with pytest.raises(ConfigError, match="did you mean steps"):
        host.start(training.request(stepz=3))
    host.start(training.request(data="stdlib", start=str(tmp_path / "nothing")))
    assert isinstance(ended(host).error, MoeClusterError)


class EndsAtStep(Metrics):
    """Sees every step first; calls `end` at step number `step` of the incarnation, if there is one."""

    def __init__(self, step: int | None, end: Callable[[], None]) -> None:
        super().__init__(model="m")
        self._left, self._end = step, end

    def observe_train_step(self, *, loss: float, aux_losses: Mapping[str, float], seconds: float) -> None:
        super().observe_train_step(loss=loss, aux_losses=aux_losses, seconds=seconds)
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                self._end()


class LosesRouters:
    """A cluster as `moecluster train` sees it. The router process of each incarnation is lost after its number of steps
    (the last one survives), before the checkpoint that would follow."""

    def __init__(self, training: Training, *, after_steps: list[int]) -> None:
        self._training, self._after_steps = training, after_steps
        self.begun_from: list[str] = []
        self.loaded = ""
        self._run_id = ""
        self._begin_incarnation()

    def _begin_incarnation(self) -> None:
        self._is_mortal = bool(self._after_steps)
        steps = self._after_steps.pop(0) if self._is_mortal else None
        self.host = self._training.host(
            Watched(self._training.cluster.placement), EndsAtStep(steps, lambda: self.host.stop(self._run_id))
        )

    def start(self, settings: Mapping[str, Any], start: str) -> None:
        self.begun_from.append(Path(start).name)
        self._run_id = f"run-{len(self.begun_from)}"
        self.host.start(StartRequest(run_id=self._run_id, settings=settings, start=start))

    def progress(self, since: int) -> RunProgress:
        if not self._is_mortal or not self.begun_from:
            return self.host.progress(self._run_id, since)
        assert ended(self.host, self._run_id).error is None
        self._begin_incarnation()
        raise Unavailable("the router is gone")  # its report is lost with it

    def stop(self) -> None:
        self.host.stop(self._run_id)

    def reload(self, checkpoint: str) -> None:
        self.loaded = Path(checkpoint).name


def run_command(training: Training, cluster: LosesRouters) -> tuple[str | None, str]:
    console = Console(width=300)
    with console.capture() as output:
        last = run(training.config, str(training.start), cluster, console)
    return last, output.get()


def test_a_run_whose_router_is_lost_begins_again_and_its_history_has_no_gap(training: Training, tmp_path: Path) -> None:
    undisturbed = losses_in_one_process(training.config)
    cluster = LosesRouters(training, after_steps=[3, 2])
    last, output = run_command(training, cluster)
    assert "the run begins again from" in output and "(2 of at most 3 times)" in output
    assert cluster.begun_from == ["step-00000000", "step-00000002", "step-00000002"]
    history = History.open(training.config.train.output_dir)
    assert_equal_within({step: done.total_loss for step, done in history.steps.items()}, undisturbed, 1e-5)
    assert last is not None and Path(last).name == cluster.loaded == "step-00000004"


def test_a_run_without_any_checkpoint_begins_anew(training: Training, tmp_path: Path) -> None:
    training.config = make_config(write_text(tmp_path), tmp_path / "run", steps=4, checkpoint_every_steps=0)
    cluster = LosesRouters(training, after_steps=[2])
    run_command(training, cluster)
    assert cluster.begun_from == ["step-00000000", "step-00000000"]


def test_a_run_begins_again_so_often_and_not_more(training: Training, tmp_path: Path) -> None:
    training.config = make_config(write_text(tmp_path), tmp_path / "run", steps=4, max_restarts=1)
    with pytest.raises(StateLost, match=r"more often than train\.max_restarts = 1; with train\.resume=true"):
        run_command(training, LosesRouters(training, after_steps=[1, 1]))


def test_a_run_without_durability_ends_with_its_router(training: Training, tmp_path: Path) -> None:
    training.config = make_config(write_text(tmp_path), tmp_path / "run", steps=4, durability="none")
    cluster = LosesRouters(training, after_steps=[1])
    with pytest.raises(StateLost, match=r"under train\.durability = checkpoint it would begin again"):
        run_command(training, cluster)
    assert len(cluster.begun_from) == 1


@pytest.mark.parametrize("wanted", ["stop", "continue"])
def test_a_run_whose_history_finds_no_room_stops_or_goes_on_as_configured(training: Training, wanted: str) -> None:
    folder = Path(training.config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").symlink_to("/dev/full")
    host = training.host(Watched(training.cluster.placement))
    host.start(training.request(checkpoint_errors=wanted))
    progress = ended(host)
    steps = [event.step for event in events_of(progress) if isinstance(event, StepDone)]
    if wanted == "continue":
        assert progress.error is None and steps == [1, 2, 3, 4]
    else:
        assert steps == []
        assert str(progress.error) == (
            f"{folder}/history.jsonl: the run's figures cannot be written (No space left on device); free some space, "
            "or choose another train.output_dir"
        )

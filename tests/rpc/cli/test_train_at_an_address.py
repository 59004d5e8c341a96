"""moecluster train against a cluster over loopback that is known by its controller's address alone."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.training_host import TrainingHost
from moecluster.cli.app import main
from moecluster.cli.commands import train
from moecluster.config import Config
from moecluster.rpc.controller.client import set_checkpoint
from moecluster.rpc.credentials import ClusterCredentials, write_secret
from moecluster.rpc.router.server import serve_router
from moecluster.training.checkpoint_store import CHECKPOINTS, CheckpointStore
from moecluster.training.setup import prepare_start
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.training.training_runs import make_config, write_text
from tests.support.waiting import wait_until

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(write_text(tmp_path), tmp_path / "run", steps=4, participant_timeout_s=5.0)


@pytest.fixture
def cluster(config: Config) -> Iterator[LoopbackCluster]:
    """Serves the run's fresh model; its router hosts training."""
    with LoopbackCluster(str(prepare_start(config).resolve())) as running:
        host = TrainingHost(
            running.remote,
            running.placements,
            announce=lambda checkpoint: set_checkpoint(running.controller_server.address, checkpoint),
            is_given=lambda path: "forbidden" not in path,
            served=lambda: running.placements.current(60.0).checkpoint,
            metrics=running.metrics,
        )
        server = serve_router(running.router, host, credentials=None)
        running.told = replace(running.router.state(), address=server.address)
        wait_until(lambda: any(state.address == server.address for state in running.controller.status().router_states))
        yield running
        server.stop(0.0)


@pytest.fixture
def run(
    cluster: LoopbackCluster, config: Config, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> Iterator[Run]:  # fmt: skip
    """Runs `moecluster train` with the configuration's settings, and more; returns its exit code and output."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(train, "POLL_S", 0.05)
    secret = tmp_path / "far.secret"
    write_secret(secret, ClusterCredentials.make())
    tables = config.to_tables()
    settings = [f"{s}.{key}={json.dumps(value)}" for s in ("model", "train") for key, value in tables[s].items()]

    def run_command(*more: str) -> SimpleNamespace:
        words = [word for setting in (*settings, *more) for word in ("--set", setting)]
        where = ["--address", cluster.controller_server.address, "--secret-file", str(secret)]
        monkeypatch.setattr(sys, "argv", ["moecluster", "train", "demo", *where, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert "Traceback" not in output.err + output.out
        return SimpleNamespace(code=ended.value.code or 0, out=output.out, err=output.err)

    yield run_command
    signal.signal(signal.SIGTERM, handler)


def test_a_run_is_trained_and_then_served(run: Run, cluster: LoopbackCluster, config: Config) -> None:
    done = run()
    assert done.code == 0, done
    latest = CheckpointStore(Path(config.train.output_dir) / CHECKPOINTS).latest()
    assert latest is not None and latest.name == "step-00000004"
    assert f"step 4: checkpoint {latest}" in done.out
    assert f"trained; its checkpoints are in {config.train.output_dir} of the first router's node" in done.out
    assert cluster.router.status().model == str(latest) == cluster.controller.status().checkpoint
    again = run()
    assert again.code == 2 and "set train.resume = true to go on from there" in again.err
    longer = run("train.steps=6", "train.resume=true")
    assert longer.code == 0 and "step 6: checkpoint" in longer.out and "step 4: checkpoint" not in longer.out


def test_what_the_cluster_was_not_given_or_cannot_see_is_refused(run: Run, config: Config) -> None:
    refused = run('train.data="/forbidden/text"')
    assert refused.code == 2 and "/forbidden/text: the cluster was not given this directory" in refused.err
    assert "cluster.directories names others" in refused.err
    refused = run('train.output_dir="runs/here"')
    assert refused.code == 2 and "train.output_dir: got runs/here, expected an absolute path" in refused.err
    assert run('train.data="/not/there"').code == 2

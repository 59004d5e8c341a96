"""The weights that a command serves: untrained ones are refused with a suggestion; served ones are reported."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors import cluster_file
from actors.cluster_file import UpCluster
from moecluster.cli.app import main
from moecluster.cli.commands import cluster as cluster_commands
from moecluster.cli.commands import serve as serving
from moecluster.cli.common.model_target import read_target
from moecluster.cli.common.model_weights import model_to_serve, trained_model, weights_in
from moecluster.errors import CheckpointError, ConfigError
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.models.checkpoint.training_progress import TrainingState, write_training_state
from moecluster.training.setup import fixed_settings

RUN = "runs/demo-{}/checkpoints/step-{:08d}"
SERVED = serving.Served(name="demo", cluster="moecluster", model="/m", seeds=ClusterAddresses(), rediscover=None)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, which must fail with a user error and start nothing; returns its one line."""

    def nothing(*_: object) -> None:
        pytest.fail("something is started")

    monkeypatch.setattr(cluster_commands, "bring_up", nothing)
    monkeypatch.setattr(serving.ServedCluster, "bring_up", nothing)
    monkeypatch.setattr(serving, "_listen", lambda config: None)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["moecluster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert ended.value.code == 2 and output.err.count("\n") == 1, output
        return output.err

    return run


def note_run(path: str, *, preset: str = "demo", step: int, written_s: float = 1.7e9, **settings: Any) -> Path:
    """Writes the parts of a training checkpoint that the commands read."""
    checkpoint = Path(path)
    checkpoint.mkdir(parents=True)
    config = read_target(preset, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
    write_training_state(checkpoint, TrainingState(step=step, data_position=0, term=1, settings=fixed_settings(config)))
    (checkpoint / "config.json").write_text("{}")
    os.utime(checkpoint / "config.json", (written_s, written_s))
    return checkpoint


@pytest.mark.parametrize("command", ["serve", "up", "generate"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_preset_without_weights_is_refused_with_what_to_type(complaint, command, fresh) -> None:
    if fresh:  # as left by a trial with random weights or by a run stopped at its start
        note_run("runs/moecluster/checkpoints/step-00000000", step=0)
    output = complaint(command, "demo", *(("x",) if command == "generate" else ()))
    assert (
        "demo has no weights: nothing is trained in runs/moecluster yet; train it with moecluster train demo" in output
    )
    assert ("try it untrained with --random-weights" in output) is (command != "generate")


@pytest.mark.parametrize("command", ["serve", "up", "generate"])
def test_the_newest_run_of_the_preset_is_named(complaint, command) -> None:
    note_run(RUN.format(1, 300), step=300, written_s=1.6e9)
    newest = note_run(RUN.format(2, 600), step=600, written_s=1.7e9)
    note_run(RUN.format(3, 900), step=900, written_s=1.8e9, model__num_experts=16)
    note_run(RUN.format(4, 900), step=900, written_s=1.8e9, preset="mixtral")
    note_run(RUN.format(5, 0), step=0, written_s=1.8e9)
    (Path(RUN.format(6, 600)) / "training").mkdir(parents=True)
    (Path(RUN.format(6, 600)) / "training" / "state.json").write_text("torn")
    for name in (1, 2):  # the state files get newer times than the weights
        file = next(Path(f"runs/demo-{name}").rglob("state.json"))
        os.utime(file, (1.6e9 + name, 1.6e9 + name))
    output = complaint(command, "demo", *(("x",) if command == "generate" else ()))
    assert f"take its newest run with moecluster {command} {newest}" in output, output


def test_what_is_trained_under_a_preset_is_served() -> None:
    note_run("runs/moecluster/checkpoints/step-00000000", step=0)
    last = note_run("runs/moecluster/checkpoints/step-00000300", step=300)
    config = read_target("demo", [])
    assert trained_model(config, "demo", "serve") == str(last.resolve())
    assert model_to_serve(config, "demo", "up", random_weights=False) == str(last.resolve())
    with pytest.raises(ConfigError, match=r"--random-weights: .*step-00000300 has weights"):
        model_to_serve(config, "demo", "up", random_weights=True)


def test_random_weights_are_no_answer_to_a_directory(complaint, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    for command in ("up", "serve"):
        assert "--random-weights: " in complaint(command, str(tmp_path / "model"), "--random-weights")


def test_random_weights_that_are_asked_for_are_written_and_told(monkeypatch, capsys) -> None:
    config = read_target("demo", [])
    path = model_to_serve(config, "demo", "up", random_weights=True)
    assert path == model_to_serve(config, "demo", "up", random_weights=True), "again is fine"
    assert str(weights_in(path)).startswith(f"{path} (untrained: random weights, written 20")
    with pytest.raises(CheckpointError, match="demo has no weights"):
        trained_model(config, "demo", "serve")
    commands: list[tuple[str, ...]] = []

    def note(own: serving.ServedCluster) -> int:
        commands.append(own.command)
        return 0

    monkeypatch.setattr(serving, "_listen", lambda config: None)
    monkeypatch.setattr(serving.ServedCluster, "bring_up", note)
    monkeypatch.setattr(serving, "_run", lambda *given: None)
    monkeypatch.setattr(serving, "_recorded", lambda name, cluster: SERVED)
    serving.serve("demo", (), serving.GatewayOptions(), (), Console(), random_weights=True)
    assert [command[len(serving.SELF) :] for command in commands] == [
        ("up", "demo", "--set", 'serve.model_name="demo"', "--random-weights")
    ]


def up(model: str) -> UpCluster:
    return UpCluster(
        name="moecluster", ray_address="a:1", model=model, router_addresses=("a:2",), controller_address="a:3",
        local_ray=None,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_a_cluster_that_serves_something_else_is_not_taken_for_the_preset(complaint, command) -> None:
    """Also if the preset itself has no weights."""
    cluster_file.save(up("/models/other"))
    output = complaint(command, "demo", *(("x",) if command == "generate" else ()))
    assert "is up and serves /models/other, not demo, of which nothing is trained in runs/moecluster" in output


def test_status_serve_and_up_tell_path_step_and_time(monkeypatch, capsys) -> None:
    path = str(note_run(RUN.format(1, 600), step=600).resolve())
    os.utime(Path(path) / "training" / "state.json", (1.7e9, 1.7e9))
    told = f"{path} (step 600, written 2023-11-1"
    monkeypatch.setattr(serving, "GatewayServer", object)

    class Server:
        wanted, url = "", "http://127.0.0.1:1"

        def run(self, sources: object) -> None:
            pass

    cluster_file.save(up(path))
    serving._run(Server(), [serving._recorded("demo", "moecluster")], Console(width=10**6))  # type: ignore[arg-type]
    assert f"demo: {told}" in capsys.readouterr().out
    monkeypatch.setattr(cluster_commands, "bring_up", lambda *_: up(path))
    cluster_commands.up(path, (), Console(width=10**6))
    assert f"is up and serves {told}" in capsys.readouterr().out


def test_weights_that_say_less_are_told_as_far_as_they_are_seen(tmp_path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"")
    os.utime(foreign / "model.safetensors", (1.7e9, 1.7e9))
    assert str(weights_in(str(foreign))).startswith(f"{foreign} (written 2023-11-1")
    assert str(weights_in("/nowhere/model")) == "/nowhere/model (not seen from here)"

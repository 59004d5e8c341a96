"""The command line with its own Ray: `down` ends everything that `up` started, and nothing else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clusters.documented_ports import documented_ports, open_sockets, unexplained
from tests.support.clusters.every_method import guarded_methods, health_methods
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.local_rays import local_rays, processes_of
from tests.support.clusters.second_user import PAGES, SECRETS, listening, try_everything

COMMAND = [sys.executable, "-c", "from moecluster.cli.app import main; main()"]
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180.0
SETTINGS = ("cluster.num_expert_actors=2", "controller.max_expert_actors=3", "controller.num_redundant_experts=4")
LIVE = tuple(word for setting in SETTINGS for word in ("--set", setting))

pytestmark = pytest.mark.timeout(400)  # every command is a process with slow imports

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def run(state_home: Path) -> Run:
    environment = {**os.environ, "XDG_STATE_HOME": str(state_home), "COLUMNS": "200"}

    def run_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*COMMAND, *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    return run_command


@pytest.fixture(scope="module")
def live(run: Run, model: str) -> Iterator[None]:
    """A running cluster for the last tests, ended after them."""
    started = run("up", model, *LIVE)
    assert started.returncode == 0, started.stderr
    try:
        assert len(local_rays()) == 1
        yield
    finally:
        ended = run("down")
    assert ended.returncode == 0, ended.stderr
    assert local_rays() == set()


def test_train_starts_what_it_needs_and_ends_it(run: Run, tmp_path: Path) -> None:
    """The settings of examples/own_text.toml, made tiny."""
    tiny = {
        "cluster.num_expert_actors": 2,
        "model.hidden_size": 24,
        "model.num_layers": 1,
        "model.expert_inner_size": 24,
        "train.steps": 4,
        "train.batch_size": 4,
        "train.sequence_length": 32,
        "train.output_dir": tmp_path / "run",
        "train.eval_batches": 1,
    }
    settings = [word for name, value in tiny.items() for word in ("--set", f"{name}={value}")]
    trained = run("train", "examples/own_text.toml", "--data", "README.md", *settings)
    assert trained.returncode == 0, trained.stderr
    assert "step 4: checkpoint" in trained.stdout
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "config.json").is_file()
    assert local_rays() == set()


def test_no_ray_at_the_address(run: Run, model: str) -> None:
    refused = run("up", model, "--set", "cluster.address=127.0.0.1:1")
    assert refused.returncode == 3
    assert refused.stderr.startswith("moecluster: no Ray cluster answers at 127.0.0.1:1")
    assert refused.stderr.count("\n") == 1


def test_too_few_gpus_end_a_start_with_nothing_left(run: Run, model: str) -> None:
    refused = run("up", model, "--set", "cluster.gpus_per_expert_actor=0.5")
    assert refused.returncode == 2
    assert "2 GPUs are missing" in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert local_rays() == set()


def test_up_on_a_given_ray_leaves_it_running(run: Run, model: str, ray_session, ray_namespace) -> None:
    settings = ("--set", f"cluster.address={ray_session.address}", "--set", f"cluster.name={ray_namespace}")
    started = run("up", model, *settings, "--set", "cluster.num_expert_actors=2")
    assert started.returncode == 0, started.stderr
    text = run("generate", model, "def main(", "--max-new-tokens", "5", *settings)
    assert text.returncode == 0, text.stderr
    ended = run("down", "--name", ray_namespace)
    assert ended.returncode == 0, ended.stderr


def test_what_is_not_up_cannot_be_ended(run: Run) -> None:
    refused = run("down")
    assert refused.returncode == 3 and refused.stderr.count("\n") == 1, refused.stderr


def test_a_live_cluster_is_changed_recorded_and_explained(live: None, run: Run, tmp_path: Path) -> None:
    """Also by a restarted controller, whose address differs from the one that `up` noted. Runs before any request,
    whose load could move experts too."""
    placed = run("place", "0/0", "expert-0", "expert-1", "--id", "both")
    assert placed.returncode == 0 and placed.stdout.startswith("both is done"), placed.stderr
    shown = run("status").stdout
    assert "9 replicas" in shown and "policy share, routers with a lease: 1" in shown
    planned = json.loads(run("plan", "--json").stdout)
    assert planned["policy"] == "share"
    for wrong in (("place", "0/0", "expert-9"), ("scale", "4"), ("drain", "moon"), ("plan", "--policy", "best")):
        refused = run(*wrong)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr

    before = json.loads(run("status", "--json", "--timeout-s", "60").stdout)
    assert before["actors"], before
    os.kill(before["actors"]["controller"]["pid"], signal.SIGKILL)
    explained = run("explain", "both", "--json")
    assert explained.returncode == 0 and "asking Ray where it is now" in explained.stderr, explained.stderr
    assert json.loads(explained.stdout)["phase"] == "done"
    again = run("operations", "--json")
    assert again.stderr == "" and "both" in [operation["id"] for operation in json.loads(again.stdout)]
    after = json.loads(run("status", "--json", "--timeout-s", "60").stdout)["controller"]
    assert after["term"] > before["controller"]["term"] and after["replicas"] == before["controller"]["replicas"]

    trace = tmp_path / "loads.jsonl"
    recorded = run("record", str(trace), "--window-s", "1", "--for-s", "2")
    assert recorded.returncode == 0, recorded.stderr
    assert len(trace.read_bytes().splitlines()) == 3


def test_status_and_outputs_of_what_is_up(live: None, run: Run, model: str, state_home: Path, tmp_path: Path) -> None:
    shown = json.loads(run("status", "--json", "--timeout-s", "60").stdout)
    assert set(shown["actors"]) == {"controller", "router", "expert-0", "expert-1"}
    assert [a["phase"] for a in shown["controller"]["actors"]] == ["serving", "serving"]
    text = run("generate", model, "def main(", "--max-new-tokens", "20")
    assert text.returncode == 0 and "20 tokens after a prompt of 9" in text.stderr, text.stderr
    streamed = subprocess.run(
        [sys.executable, "examples/stream.py", "def main(", "--router", shown["actors"]["router"]["address"]],
        env={**os.environ, "XDG_STATE_HOME": str(state_home), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert "tokens after a prompt of 9: " in streamed.stdout, streamed.stdout + streamed.stderr
    again = run("up", model, *LIVE)
    assert again.returncode == 2 and "is up already" in again.stderr
    too_long = run("generate", model, "x" * 300)
    assert too_long.returncode == 2 and "exceed the model's 256" in too_long.stderr
    other = run("generate", save_tiny_model(tmp_path / "other"), "x")
    assert other.returncode == 2 and "is up and serves" in other.stderr


def test_only_documented_ports_are_open_and_none_beyond_the_loopback(live: None, state_home: Path) -> None:
    noted = json.loads((state_home / "moecluster" / "moecluster.json").read_text())
    processes = processes_of(noted["local_ray"]["mark"])
    found = list(open_sockets(processes))
    assert unexplained(found, documented_ports()) == []
    assert {"gcs_server", "raylet", "ray::ExpertActor", "ray::RouterActor", "ray::ControllerActor"} <= {
        each.process for each in found
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_host_is_refused_everything(live: None, run: Run, state_home: Path) -> None:
    """Ports x attempts: every method of every service of the cluster and of Ray, at every port of the processes."""
    shown = json.loads(run("status", "--json", "--timeout-s", "60").stdout)
    up = state_home / "moecluster" / "moecluster.json"
    noted = json.loads(up.read_text())
    processes = processes_of(noted["local_ray"]["mark"])
    ports = listening(processes)
    assert {address for address, _ in ports.values()} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, ports
    folder = Path(noted["local_ray"]["folder"])
    private = [up, up.parent, Path(noted["secret_file"]), folder, folder / "token", *folder.rglob("sockets/*")]
    assert len(private) > 5 and all(path.exists() for path in private)
    private += [Path(f"/proc/{p.pid}/{name}") for p in processes for name in ("fd", "mem", "environ")]
    outcomes = try_everything(ports, private)

    assert set(outcomes.files.values()) == {"refused"}, outcomes.files
    own = {int(reached["address"].rpartition(":")[2]) for reached in shown["actors"].values()}
    assert own <= {int(port) for port, calls in outcomes.calls.items() if calls}
    ours = {method.path for method in guarded_methods()}
    health = {method.path for method in health_methods()}
    for port, calls in outcomes.calls.items():
        for attempt, status in calls.items():
            method = attempt.rpartition(" ")[2]
            if int(port) in own:
                expected = {"UNAUTHENTICATED"} if method not in health else {"OK", "UNIMPLEMENTED"}
            else:  # Ray's: every method requires Ray's token, except health and reflection
                expected = {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}
                if method in health or method.startswith("/grpc.reflection."):
                    expected.add("OK")
            assert status in expected, (port, ports[int(port)], attempt, status)
        assert int(port) not in own or len(calls) >= len(SECRETS) * len(ours)
    for reached in shown["actors"].values():
        pages = outcomes.pages[reached["metrics_address"].rpartition(":")[2]]
        assert len(pages) == len(SECRETS) * len(PAGES) and set(pages.values()) == {401}, pages
    assert run("status").returncode == 0  # and the cluster still serves

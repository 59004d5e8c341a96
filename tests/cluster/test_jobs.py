"""Jobs on a real Ray head with its dashboard, in namespaces of its own: submit, follow, list, stop.

A training and a serving job on several hosts: tests/hosts.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts.namespace import Namespace, lacking

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"
JOB_SERVER = "http://127.0.0.1:8265"
START = (
    *("ray", "start", "--head", "--node-ip-address=127.0.0.1", "--port=6379", "--dashboard-host=127.0.0.1"),
    *("--num-cpus=2", "--object-store-memory=100000000"),
)

pytestmark = [
    pytest.mark.skipif(bool(lacking()), reason=f"a Ray of its own needs {lacking()}"),
    pytest.mark.timeout(400),  # every command and every job is a process with slow imports
]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    home = tmp_path_factory.mktemp("jobs") / "home"
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    with Namespace("head", home, environment={"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"}) as head:
        head.run(*START, RAY_AUTH_MODE="token", RAY_worker_niceness="0", timeout_s=180.0)
        yield head


def run(head: Namespace, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Runs moecluster on the head, with the token of its home directory."""
    return head.run("moecluster", *words, check=False, timeout_s=200.0, **variables)


def test_a_job_runs_in_its_directory_and_its_exit_code_is_the_commands(head: Namespace) -> None:
    folder = head.home / "work"
    folder.mkdir()
    (folder / "mine.toml").write_text("[model]\nnum_experts = 4\n")
    (folder / "tls.key").write_text("secret")
    done = run(head, "submit", "--working-dir", str(folder), "--id", "first", "params", "mine.toml")
    assert done.returncode == 0, done.stderr
    assert "experts per layer, active per token │ 4, 2" in done.stdout
    assert f"working directory: 1 files of {folder}" in done.stderr
    assert "job first is submitted" in done.stderr and "job first" not in done.stdout.splitlines()[0]

    again = run(head, "submit", "--id", "first", "params", "demo")
    assert again.returncode == 2 and "has a job of this id already" in again.stderr, again.stderr

    failed = run(head, "submit", "params", "mine.toml")  # without the directory
    assert failed.returncode == 2
    assert 'moecluster: "mine.toml": no such model directory, TOML file or preset' in failed.stdout

    listed = json.loads(run(head, "jobs", "--json").stdout)
    assert [(job["status"], job["exit_code"]) for job in listed] == [("SUCCEEDED", 0), ("FAILED", 2)]
    assert listed[0]["id"] == "first" and listed[0]["entrypoint"] == "moecluster params mine.toml"
    assert TOKEN not in json.dumps(listed)


def test_a_job_is_stopped_as_by_ctrl_c(head: Namespace) -> None:
    """`batch` waits for a gateway that is not there, and says where it left off when it is ended."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}
    folder = head.home / "requests"
    folder.mkdir()
    (folder / "in.jsonl").write_text(json.dumps(line) + "\n")
    (head.home / "out").mkdir()
    submitted = run(head, "submit", "--no-wait", "--working-dir", str(folder), "batch", "in.jsonl", "out/answers.jsonl")
    job = submitted.stdout.strip()
    follow = ("ray", "job", "logs", "--address", JOB_SERVER, "--follow", job)
    log = head.start(*follow, RAY_AUTH_MODE="token", PYTHONUNBUFFERED="1")
    assert log.stdout is not None
    assert any("takes no requests" in text for text in log.stdout)
    stopped = run(head, "stop", job)
    assert stopped.returncode == 0 and f"the job {job} has ended: stopped" in stopped.stdout, stopped.stderr
    assert f"0 of 1 lines are kept in {head.home}/out" in log.stdout.read().replace("/root", str(head.home))
    log.wait()
    over = run(head, "stop", job)
    assert over.returncode == 0 and "had ended already: stopped" in over.stdout


def test_ray_job_submit_does_the_same(head: Namespace) -> None:
    words = ("ray", "job", "submit", "--address", JOB_SERVER, "--", "moecluster", "params", "demo")
    assert "experts per layer" in head.run(*words, RAY_AUTH_MODE="token", timeout_s=200.0).stdout


@pytest.mark.parametrize(
    ("words", "variables", "code", "message"),
    [
        (("jobs",), {"RAY_AUTH_TOKEN": "another-token-of-32-characters-xx"}, 2, "asks for a token, and that of this"),
        (("jobs",), {"RAY_AUTH_MODE": "disabled"}, 2, "asks for a token, and that of this command is missing"),
        (("jobs", "--address", "127.0.0.1:6379"), {}, 3, "no job server of Ray answers at http://127.0.0.1:6379"),
        (("jobs", "--address", "127.0.0.1:1"), {}, 3, "The local Ray of moecluster up has none"),
        (("jobs",), {"RAY_ADDRESS": "127.0.0.1:1"}, 0, ""),  # of another Ray: it overrides nothing
        (("stop", "nowhere"), {}, 2, f"no job nowhere at {JOB_SERVER}; moecluster jobs lists them"),
    ],
)
def test_errors_are_one_line(
    head: Namespace, words: tuple[str, ...], variables: dict[str, str], code: int, message: str
) -> None:
    done = run(head, *words, **variables)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == bool(message), done.stderr
    assert TOKEN not in done.stderr

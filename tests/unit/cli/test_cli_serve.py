"""Wrong options of `serve` and `gateway` are reported before anything is started or listens for long."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from actors import cluster_file
from actors.cluster_file import UpCluster
from moecluster.cli.app import main
from moecluster.cli.commands import serve as serving
from moecluster.rpc.credentials import state_folder


@pytest.fixture
def complaint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Runs the command line, which must fail with a user error; returns its one line."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moecluster.cli.app.end_by_signals", nullcontext)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["moecluster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert ended.value.code in (2, 3) and output.err.count("\n") == 1, output
        return output.err

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("serve", "nothing-here"), "no such model directory, TOML file or preset"),
        (("serve", "demo", "--host", "0.0.0.0"), "there are no API keys"),
        (("serve", "demo", "--api-keys-file", "none"), "security.api_keys_file: none cannot be read"),
        (("serve", "demo", "--port", "70000"), "serve.port: got 70000"),
        (("serve", "demo", "--also", "second"), "expected NAME=CLUSTER"),
        (("serve", "demo", "--also", "b=second"), "no cluster second is up"),
        (("gateway",), "there is none to serve"),
        (("gateway", "--model", "a=first"), "no cluster first is up"),
        (("gateway", "--model", "a=first", "--model", "a=second"), "a name is given twice"),
        (("gateway", "--model", "a=10.0.0.7:20000"), "the cluster at 10.0.0.7:20000: asks for its secret"),
        (("gateway", "--model", "a=10.0.0.7:0"), 'model: got "10.0.0.7:0", expected HOST:PORT'),
        (
            ("gateway", "--model", "a=first", "--secret-file", "f"),
            "--secret-file: got 1, expected one for all clusters",
        ),
        (
            ("gateway", *("--model", "a=h:1") * 1, *("--model", "b=h:2") * 1, *("--secret-file", "f") * 3),
            "--secret-file: got 3, expected one for all clusters at addresses, or one for each of the 2",
        ),
        (("gateway", "--model", "a=first", "--set", "serve.prot=1"), "did you mean port"),
    ],
)
def test_mistakes_are_one_line(complaint, arguments, expected) -> None:
    assert expected in complaint(*arguments)
    assert not state_folder().exists()


def test_a_cluster_that_serves_something_else_is_not_served_under_a_wrong_name(complaint, tmp_path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    up = UpCluster(
        name="moecluster", ray_address="127.0.0.1:1", model="/models/other", router_addresses=("127.0.0.1:2",),
        controller_address="127.0.0.1:3", local_ray=None,
    )  # fmt: skip
    cluster_file.save(up)
    assert "serves /models/other, not" in complaint("serve", str(model))


def test_what_brings_a_cluster_up_and_does_not_end_when_told_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    stubborn = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    monkeypatch.setattr(serving, "SELF", (sys.executable, "-c", stubborn))
    monkeypatch.setattr(serving, "ENDING_TIMEOUT_S", 0.2)

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as Ctrl-C: it interrupts a wait

    interrupting = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    try:
        interrupting.start()
        begun_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            serving.ServedCluster("moecluster", ("demo",), restarts=0, ending=lambda: False).bring_up()
        interrupting.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun_s < 30.0

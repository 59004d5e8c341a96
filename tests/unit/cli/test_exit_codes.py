"""Exit codes of all commands: 0 done, 1 failed, 2 wrong usage, 3 no cluster, 130 Ctrl-C; each error is one line."""

import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from moecluster import __version__, errors
from moecluster.cli import exit_codes
from moecluster.cli.app import app, main
from moecluster.cli.exit_codes import exit_code
from moecluster.cli.http_commands import bench

Run = Callable[..., tuple[int, str, str]]
COMMANDS = sorted(c.callback.__name__ for c in app.registered_commands if c.callback)
# The minimal arguments of each command.
ARGUMENTS = {
    "generate": ("demo", "x"),
    "params": ("demo",),
    "scale": ("3",),
    "drain": ("expert-0",),
    "place": ("0/1", "expert-0"),
    "update": (".",),
    "explain": ("x",),
    "record": ("x.jsonl",),
    "replay": ("x.jsonl",),
    "batch": ("in.jsonl", "out.jsonl"),
    "gateway": ("--model", "a=first"),
}
# Commands that need a running cluster and name it by --name; others name it in other ways.
NAMED = ("status", "down", "scale", "drain", "place", "update", "plan", "operations", "explain", "record")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs a command; returns its exit code and output."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}\n'
    )

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moecluster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert "Traceback" not in output.out + output.err
        return int(ended.value.code or 0), output.out, output.err

    yield run_command
    signal.signal(signal.SIGTERM, handler)


def all_errors(kind: type[errors.MoeClusterError]) -> Iterator[type[errors.MoeClusterError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from all_errors(below)


def test_every_error_has_its_code() -> None:
    codes = {kind.__name__: exit_code(kind.__new__(kind)) for kind in all_errors(errors.MoeClusterError)}
    assert codes.pop("ClusterNotFound") == exit_codes.NO_CLUSTER == 3
    usage = {kind.__name__ for kind in all_errors(errors.UserError)} - {"ClusterNotFound"}
    assert {name for name, code in codes.items() if code == exit_codes.WRONG_USAGE == 2} == usage
    assert {code for name, code in codes.items() if name not in usage} == {exit_codes.FAILED} == {1}


@pytest.mark.parametrize("command", NAMED)
def test_no_cluster_is_3(run: Run, command: str) -> None:
    code, _, err = run(command, *ARGUMENTS.get(command, ()), "--name", "second")
    assert code == 3 and "no cluster second is up" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("gateway", "--model", "a=second"),
        ("serve", ".", "--also", "b=second"),
        ("batch", "in.jsonl", "out.jsonl", "--cluster", "second"),
    ],
)
def test_no_cluster_is_3_however_it_is_named(run: Run, arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 3 and "no cluster second is up" in err, err


@pytest.mark.parametrize("command", [*COMMANDS, "bench serve"])
def test_wrong_usage_is_2(run: Run, command: str) -> None:
    code, _, err = run(*command.split(), "--no-such-option")
    assert code == 2 and "--no-such-option" in err


@pytest.mark.parametrize("command", [*COMMANDS, "bench serve"])
def test_help_is_0_and_ctrl_c_is_130(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, output, _ = run(*command.split(), "--help")
    assert code == 0 and "…" not in output, output
    group, name = (bench, "serve") if command == "bench serve" else (app, command)
    (info,) = [c for c in group.registered_commands if c.callback and c.callback.__name__ == name]

    def interrupted() -> None:
        raise KeyboardInterrupt

    interrupted.__name__ = name
    monkeypatch.setattr(info, "callback", interrupted)
    assert run(*command.split())[0] == exit_codes.INTERRUPTED == 130


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.OperationFailed("it ended"), 1, "moecluster: OperationFailed: it ended\n"),
        (errors.ConfigError("x: got 1\nexpected 2"), 2, "moecluster: x: got 1 expected 2\n"),
        (errors.ClusterNotFound("none is up"), 3, "moecluster: none is up\n"),
        (
            OSError(errno.ENOSPC, "No space left", "runs/x"),
            1,
            "moecluster: No space left: runs/x\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "moecluster: Permission denied: x\n"),
    ],
)
def test_what_ends_a_command_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, error, code, line) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("moecluster.cli.commands.params.params", fails)
    assert run("params", "demo") == (code, "", line)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    monkeypatch.setattr("moecluster.cli.commands.params.params", fails)
    monkeypatch.setattr(sys, "argv", ["moecluster", "params", "demo"])
    monkeypatch.setattr("moecluster.cli.app.end_by_signals", nullcontext)
    with pytest.raises(FileNotFoundError):
        main()


def test_the_version_and_the_codes_are_told(run: Run) -> None:
    assert run("--version") == (0, f"moecluster {__version__}\n", "")
    code, output, _ = run("--help")
    assert code == 0
    assert " ".join(exit_codes.HELP.split()) in " ".join(output.replace("│", " ").split())


def test_a_plan_has_no_option_that_is_always_on(run: Run) -> None:
    assert run("plan", "--dry-run")[0] == 2

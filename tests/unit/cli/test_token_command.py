"""moecluster token: standard output holds the token alone, and it is good at the cluster whose secret is here."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from moecluster.cli.app import main
from moecluster.rpc.credentials import SECRET_FILE_VARIABLE, ClusterCredentials, secret_path, write_secret
from moecluster.rpc.scopes import Scope
from moecluster.rpc.tokens import make_token, read_token

Run = Callable[..., tuple[int, str, str]]
SECOND = ClusterCredentials.make(cluster="second")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `moecluster token`; returns its exit code and output."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(SECRET_FILE_VARIABLE, raising=False)
    monkeypatch.setattr("moecluster.cli.app.end_by_signals", nullcontext)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moecluster", "token", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run_command


@pytest.mark.parametrize("option", ["--cluster", "--name"])
def test_it_prints_a_token_for_the_cluster(run: Run, option: str) -> None:
    write_secret(secret_path("second"), SECOND)
    code, out, err = run(
        "--scope", "infer", "--scope", "read", "--expires-in", "12h", "--subject", "ci", option, "second"
    )
    assert code == 0, err
    claims = read_token(SECOND, out.removesuffix("\n"))
    assert claims.subject == "ci" and claims.scopes == {Scope.INFER, Scope.READ}
    assert err.startswith("allows infer read at the cluster second until 20") and err.count("\n") == 1
    assert SECOND.secret not in out + err


def test_the_secret_of_another_host_is_taken_from_its_file(run: Run, monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "copied" / "secret"
    write_secret(file, SECOND)
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(file))
    code, out, _ = run("--scope", "train", "--cluster", "second", "--subject", "ci")
    assert code == 0 and read_token(SECOND, out.strip()).scopes == {Scope.TRAIN}
    started_here = ClusterCredentials.make(cluster="third")
    write_secret(secret_path("third"), started_here)
    code, out, _ = run("--scope", "train", "--cluster", "third", "--subject", "ci")
    assert code == 0 and read_token(started_here, out.strip()).subject == "ci"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--scope", "infer"), "the cluster secret cannot be read"),
        (("--scope", "all", "--cluster", "second"), "'all' is not one of"),
        (("--cluster", "second"), "a token needs a scope"),
        (("--scope", "infer", "--cluster", "second", "--expires-in", "1 week"), '--expires-in: got "1 week"'),
        (("--scope", "infer", "--cluster", "second", "--expires-in", "2000d"), "at most 366 days"),
        (("--scope", "infer", "--cluster", "second", "--expires-in", "0s"), "lifetime: got 0 s"),
        (("--scope", "infer", "--cluster", "second", "--subject", "a b"), 'subject: got "a b"'),
    ],
)
def test_mistakes_are_told(run: Run, arguments: tuple[str, ...], complaint: str) -> None:
    write_secret(secret_path("second"), SECOND)
    code, out, err = run(*arguments)
    assert code == 2 and complaint in " ".join(err.split()) and not out


def test_a_token_makes_no_tokens(run: Run) -> None:
    token = make_token(SECOND, scopes=list(Scope), subject="ci", lifetime_s=60)
    write_secret(secret_path("second"), ClusterCredentials(token=token))
    code, out, err = run("--scope", "infer", "--cluster", "second")
    assert code == 2 and "a token cannot make tokens" in err and not out and token not in err

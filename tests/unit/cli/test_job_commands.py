"""submit, jobs and stop, before they reach a job server."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moecluster.cli.app import app
from moecluster.cli.commands.jobs import refuse_secrets
from moecluster.cli.common.job_server import DEFAULT_ADDRESS, job_server_url
from moecluster.errors import ConfigError, MoeClusterError

SECRET = "0123456789abcdef"


def run(*words: str) -> Any:
    """Runs a command that must not get as far as the job server."""
    return CliRunner().invoke(app, [*words[:1], "--address", "http://127.0.0.1:1", *words[1:]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tain", "demo"), 'submit: got "tain", expected a command of moecluster: up, '),
        (("jobs",), 'submit: got "jobs", expected'),
        (("--id", "a b", "train"), '"a b" is no id of a job'),
        (("--exclude", "x", "train"), "--exclude: leaves files of --working-dir out, which is not given"),
        (("--working-dir", "/nowhere", "train"), '--working-dir: got "/nowhere", expected a directory'),
    ],
)
def test_bad_submissions_are_refused_in_one_line(words: tuple[str, ...], message: str) -> None:
    refused = run("submit", *words)
    assert isinstance(refused.exception, MoeClusterError)
    assert str(refused.exception).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--nope"), "No such option: --nope"),
        (("bench", "serve", "--request-rate", "fast"), "Invalid value for '--request-rate'"),
        (("train", "demo", "more"), "unexpected extra argument"),
    ],
)
def test_a_command_line_that_would_fail_there_fails_here(words: tuple[str, ...], message: str) -> None:
    refused = run("submit", *words)
    assert refused.exit_code == 2 and message in refused.output, refused.output


def test_help_of_a_command_is_printed_here() -> None:
    shown = run("submit", "train", "--help")
    assert shown.exit_code == 0 and "each expert in its actor" in shown.output


def test_options_behind_the_command_are_the_commands() -> None:
    """`--address` before it is the job server's, `--name` after it the cluster's."""
    refused = run("submit", "status", "--address", "x", "--nope")
    assert refused.exit_code == 2 and "No such option" in refused.output


def test_no_secret_goes_into_a_command_that_the_dashboard_shows(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(f"{SECRET}\n")
    for environment in (
        {"RAY_AUTH_TOKEN": SECRET},
        {"MOECLUSTER_API_KEY": SECRET},
        {"RAY_AUTH_TOKEN_PATH": str(token)},
        {"MOECLUSTER_SECRET_FILE": str(token)},
    ):
        with pytest.raises(ConfigError, match=next(iter(environment))) as refused:
            refuse_secrets(["train", "-s", f"cluster.name={SECRET}"], environment)
        assert SECRET not in str(refused.value)
        refuse_secrets(["train", "demo"], environment)
    refuse_secrets(["train", "demo"], {"MOECLUSTER_API_KEY": "demo", "RAY_AUTH_TOKEN_PATH": "/nowhere"})


def test_where_the_job_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert job_server_url(None) == DEFAULT_ADDRESS
    assert job_server_url("10.0.0.10:8265") == "http://10.0.0.10:8265"
    assert job_server_url("https://ray.example:443/") == "https://ray.example:443"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://[2001:db8::1]:8265")
    assert job_server_url(None) == "http://[2001:db8::1]:8265"
    assert job_server_url("http://a:1") == "http://a:1"


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "http://head", "head:port", "http://:1"])
def test_what_is_no_address_of_a_job_server(address: str) -> None:
    with pytest.raises(ConfigError, match="expected http://HOST:PORT of the dashboard"):
        job_server_url(address)


def test_an_id_cannot_name_another_path_of_the_server() -> None:
    refused = run("stop", "../version")
    assert isinstance(refused.exception, MoeClusterError) and "is no id of a job" in str(refused.exception)

"""submit, jobs and stop: commands of moecluster as jobs of a Ray cluster."""

import dataclasses
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from moecluster.cli.common.event_loop import run_until_signalled
from moecluster.cli.common.formatting import shown_bytes, shown_time, to_json
from moecluster.cli.common.job_server import STOP_WAIT_S, Job, JobServer, job_server_url
from moecluster.cli.common.tables import make_table, show_table
from moecluster.cli.common.working_dir import pack
from moecluster.cli.exit_codes import FAILED
from moecluster.errors import ConfigError, UserError

PROGRAM = "moecluster"
NOT_AS_JOBS = ("submit", "jobs", "stop")
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
SIGNALLED = 128  # exit code of a command that a signal ended, without the signal's number
SECRET_VARIABLES = ("MOECLUSTER_API_KEY", "RAY_AUTH_TOKEN", "OPENAI_API_KEY", "HF_TOKEN")
SECRET_FILE_VARIABLES = ("RAY_AUTH_TOKEN_PATH", "MOECLUSTER_SECRET_FILE")
SHORTEST_SECRET = 8  # characters: anything shorter is found in harmless words


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What to submit."""

    command: Sequence[str]
    working_dir: Path | None
    exclude: Sequence[str]
    job_id: str  # empty: Ray makes one
    wait: bool


def submit(submission: Submission, address: str | None, context: typer.Context, console: Console) -> int:
    """Submits a job; prints its id, or follows its log. Returns the exit code: with `wait`, that of its command.

    context: of this command. console: for messages; the log goes to stdout.
    """
    url = job_server_url(address)
    if submission.job_id:
        _check_job_id(submission.job_id)
    check_command(submission.command, context)
    refuse_secrets(submission.command, os.environ)
    if submission.exclude and submission.working_dir is None:
        raise ConfigError("--exclude: leaves files of --working-dir out, which is not given")
    entrypoint = shlex.join((PROGRAM, *submission.command))
    with tempfile.TemporaryDirectory(prefix="moecluster-job-") as folder:
        package = None
        if submission.working_dir is not None:
            packed = pack(submission.working_dir, Path(folder) / "working_dir.zip", exclude=submission.exclude)
            package = packed.path
            size = shown_bytes(packed.total_bytes)
            _say(console, f"working directory: {packed.files} files of {submission.working_dir}, {size}")
        server = JobServer(url)
        job_id = server.submit(entrypoint, package=package, job_id=submission.job_id)
    if not submission.wait:
        print(job_id)
        return 0
    _say(console, f"job {job_id} is submitted to {url}; Ctrl-C leaves it running, moecluster stop {job_id} ends it")
    try:
        job = run_until_signalled(server.follow(job_id, _write))
    except (KeyboardInterrupt, SystemExit):
        _say(console, f"the job {job_id} goes on; moecluster stop {job_id} ends it")
        raise
    return _exit_code(job, console)


def jobs(address: str | None, as_json: bool, console: Console) -> None:
    """Lists the jobs of a cluster."""
    found = JobServer(job_server_url(address)).jobs()
    if as_json:
        console.print_json(to_json([dataclasses.asdict(job) for job in found]))
        return
    columns = ("job", "status", "submitted", "took", "exit code", "command")
    table = make_table(*columns, prose=("command",), box=None, pad_edge=False)
    for job in found:
        cells = (
            job.id,
            job.status.lower(),
            shown_time(job.submitted_s) if job.submitted_s else "",
            f"{max((job.ended_s or time.time()) - job.submitted_s, 0.0):.0f} s" if job.submitted_s else "",
            "" if job.exit_code is None else str(_shell_code(job.exit_code)),
            job.entrypoint,
        )
        table.add_row(*(escape(cell) for cell in cells))
    if found:
        show_table(table, console)
    else:
        console.print("no job was submitted yet")


def stop(job_id: str, address: str | None, wait: bool, console: Console) -> None:
    """Stops a job."""
    _check_job_id(job_id)
    server = JobServer(job_server_url(address))
    if not server.stop(job_id):
        _say(console, f"the job {job_id} had ended already: {server.job(job_id).status.lower()}")
        return
    if not wait:
        _say(console, f"the job {job_id} is asked to end")
        return
    with console.status(f"ending {job_id}"):
        ended = server.wait(job_id, 2 * STOP_WAIT_S)
    _say(console, f"the job {job_id} has ended: {ended.status.lower()}")


def check_command(words: Sequence[str], context: typer.Context) -> None:
    """Parses a command line of moecluster as it will be parsed on the cluster.

    Raises ConfigError; what typer raises for wrong options, and for --help, which it prints.
    """
    root = context.find_root()
    program = root.command
    assert isinstance(program, TyperGroup)
    name, *arguments = words
    command = program.get_command(root, name)
    if command is None or name in NOT_AS_JOBS:
        known = [known for known in program.list_commands(root) if known not in NOT_AS_JOBS]
        raise ConfigError(f'submit: got "{name}", expected a command of moecluster: {", ".join(known)}')
    with command.make_context(name, list(arguments), parent=root) as parsed:
        if isinstance(command, TyperGroup):  # such as bench, whose commands have options of their own
            nested, inner, rest = command.resolve_command(parsed, arguments)
            assert inner is not None
            inner.make_context(nested, rest, parent=parsed)


def refuse_secrets(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises ConfigError if an argument holds a secret of this process: the dashboard shows a job's command.

    The message names the secret's place, never the secret.
    """
    secrets = {f"${name}": environment.get(name, "") for name in SECRET_VARIABLES}
    for name in SECRET_FILE_VARIABLES:
        with suppress(OSError, UnicodeDecodeError):
            secrets[f"the file of ${name}"] = Path(environment[name]).read_text() if environment.get(name) else ""
    for place, secret in secrets.items():
        if len(secret.strip()) >= SHORTEST_SECRET and any(secret.strip() in word for word in words):
            raise ConfigError(
                f"submit: an argument holds the secret of {place}, and the dashboard shows a job's command to all who "
                "may see it; put the secret into a file on the cluster's head, and give its path"
            )


def _check_job_id(job_id: str) -> None:
    if not JOB_ID.fullmatch(job_id):
        raise UserError(f'"{job_id}" is no id of a job: expected letters, digits, dots, dashes and underscores')


def _exit_code(job: Job, console: Console) -> int:
    if job.status == "SUCCEEDED":
        return 0
    if job.exit_code is not None:
        return _shell_code(job.exit_code) or FAILED
    # It was stopped, or never ran: only then the job server's message says what the log does not.
    _say(console, f"job {job.id} {job.status.lower()}: {' '.join(job.message.split())}")
    return FAILED


def _shell_code(exit_code: int) -> int:
    """Returns the exit code as a shell shows it: -9 becomes 137."""
    return SIGNALLED - exit_code if exit_code < 0 else exit_code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(console: Console, message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)

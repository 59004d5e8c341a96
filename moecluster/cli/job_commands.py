"""Commands to the job server of a Ray cluster: run a command of moecluster there, list such jobs, stop them."""

from pathlib import Path
from typing import Annotated

import typer

from moecluster.cli.common.console import make_console
from moecluster.cli.common.extras import need
from moecluster.cli.common.options import Json

JOBS = "jobs"  # the extra

Address = Annotated[
    str | None,
    typer.Option(
        help="URL of the cluster's dashboard: default $RAY_API_SERVER_ADDRESS, then http://127.0.0.1:8265",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(
        epilog="Example: moecluster submit --working-dir . train my.toml --data corpus    or: "
        "moecluster submit --no-wait serve /models/tiny    Without --no-wait, the exit code is that of the command.",
        # What follows the command's name belongs to that command.
        context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
    )(submit)
    app.command(epilog="Example: moecluster jobs    or: moecluster jobs --json")(jobs)
    app.command(epilog="Example: moecluster stop raysubmit_4LamXRuQpYdSMg7J")(stop)


def submit(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(help="a command of moecluster with its options, to run on the cluster's head")
    ],
    address: Address = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="directory to send, in which the command then runs", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="files of it to leave out, as in .gitignore; may be repeated", show_default=False),
    ] = None,
    job_id: Annotated[str, typer.Option("--id", help="id of the job; default: a new one", show_default=False)] = "",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the log until the job ends")] = True,
) -> None:
    """Run a command of moecluster as a job of a Ray cluster, such as train, serve, batch or up, and follow its log."""
    need(JOBS, "moecluster submit")
    from moecluster.cli.commands.jobs import Submission
    from moecluster.cli.commands.jobs import submit as run

    submission = Submission(command=command, working_dir=working_dir, exclude=exclude or (), job_id=job_id, wait=wait)
    if code := run(submission, address, context, make_console(stderr=True)):
        raise typer.Exit(code)


def jobs(address: Address = None, json: Json = False) -> None:
    """List the jobs of a Ray cluster, the oldest first."""
    need(JOBS, "moecluster jobs")
    from moecluster.cli.commands.jobs import jobs as run

    run(address, json, make_console())


def stop(
    job: Annotated[str, typer.Argument(metavar="JOB", help="id of the job (moecluster jobs lists them)")],
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="wait until the job has ended")] = True,
) -> None:
    """Stop a job: its command cleans up as after Ctrl-C, and is killed if that takes longer than 90 s."""
    need(JOBS, "moecluster stop")
    from moecluster.cli.commands.jobs import stop as run

    run(job, address, wait, make_console())

"""The commands that ask a cluster's controller: to change placement or size, and what it does and would do."""

from typing import Annotated

import typer

from moecluster.cli.common.console import make_console
from moecluster.cli.common.options import Json, Name

OperationId = Annotated[
    str, typer.Option("--id", help="the operation's id: the same again asks for nothing new", show_default=False)
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="wait until it is done")]


def add_to(app: typer.Typer) -> None:
    """Makes these commands part of the command line."""
    app.command(epilog="Example: moecluster scale 4    or: moecluster scale --routers 2 --id evening --no-wait")(scale)
    app.command(epilog="Example: moecluster drain expert-1    or: moecluster drain host-7")(drain)
    app.command(epilog="Example: moecluster place 3/17 expert-0 expert-2    or: moecluster place 3/17 --nowhere")(place)
    app.command(
        epilog="Example: moecluster update ./Mixtral-v2    or: moecluster update ./tuned --experts 3/7 --keep-trunk"
    )(update)
    app.command(epilog="Example: moecluster plan    or: moecluster plan --policy eplb --json")(plan)
    app.command(epilog="Example: moecluster operations    or: moecluster operations --limit 100 --json")(operations)
    app.command(epilog="Example: moecluster explain rebalance-5f0c11d2")(explain)


def scale(
    number: Annotated[
        int | None, typer.Argument(metavar="N", help="how many expert actors there shall be", show_default=False)
    ] = None,
    routers: Annotated[
        int | None, typer.Option(help="how many routers there shall be, instead of N", show_default=False)
    ] = None,
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = "moecluster",
) -> None:
    """Start expert actors or routers, or empty and end some, while the cluster serves."""
    from moecluster.cli.commands.operations import scale as run

    run(name, number, routers, operation_id, wait, make_console())


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE|ACTOR", help="a node, or the name of one expert actor")],
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = "moecluster",
) -> None:
    """Move all experts off a node or an actor, while they serve; then it may go."""
    from moecluster.cli.commands.operations import drain as run

    run(name, node, operation_id, wait, make_console())


def place(
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="layer/index")],
    actors: Annotated[list[str] | None, typer.Argument(metavar="ACTOR", help="where it shall stand")] = None,
    nowhere: Annotated[bool, typer.Option("--nowhere", help="unload it until a token wants it")] = False,
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = "moecluster",
) -> None:
    """Let an expert stand on exactly these actors, while it serves."""
    from moecluster.cli.commands.operations import place as run

    run(name, expert, actors or (), nowhere, operation_id, wait, make_console())


def update(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="a checkpoint of the same shape, which all nodes see")
    ],
    experts: Annotated[
        list[str] | None,
        typer.Option(help="take only these experts from it, layer/index or 4/*; may be repeated", show_default=False),
    ] = None,
    keep_trunk: Annotated[bool, typer.Option("--keep-trunk", help="take only experts from it")] = False,
    out: Annotated[
        str,
        typer.Option(
            help="where the checkpoint is put together, if it takes only a part; default: beside the one served",
            show_default=False,
        ),
    ] = "",
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = "moecluster",
) -> None:
    """Replace weights while they serve: texts that are begun end with the old ones, and no request fails."""
    from moecluster.cli.commands.update import update as run

    run(name, directory, experts or (), keep_trunk, out, operation_id, wait, make_console())


def plan(
    policy: Annotated[
        str, typer.Option(help="the policy to ask; by default the cluster's (controller.policy)", show_default=False)
    ] = "",
    json: Json = False,
    name: Name = "moecluster",
) -> None:
    """Show what a policy would do to the cluster now: what would move, the gain, the bytes. Nothing is done."""
    from moecluster.cli.commands.plan import plan as run

    run(name, policy, json, make_console())


def operations(
    limit: Annotated[int, typer.Option(help="how many, the newest first; 0: all that are kept", min=0)] = 20,
    json: Json = False,
    name: Name = "moecluster",
) -> None:
    """List what the controller does and has done to placement and size."""
    from moecluster.cli.commands.operations import operations as run

    run(name, limit, json, make_console())


def explain(
    operation: Annotated[str, typer.Argument(help="its id, as moecluster operations lists it")],
    json: Json = False,
    name: Name = "moecluster",
) -> None:
    """Say why an operation was begun, how far it is, what it moved, and its predicted and measured gain."""
    from moecluster.cli.commands.operations import explain as run

    run(name, operation, json, make_console())

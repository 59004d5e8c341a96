"""Commands to a cluster's controller: change placement or size, and show operations and plans."""

from typing import Annotated

import typer

from moecluster.cli.common.console import make_console
from moecluster.cli.common.options import Address, Json, Name, SecretFile

OperationId = Annotated[
    str, typer.Option("--id", help="operation id: repeating a command with the same id is safe", show_default=False)
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="wait until the operation has ended")]


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
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
        int | None, typer.Argument(metavar="N", help="target number of expert actors", show_default=False)
    ] = None,
    routers: Annotated[
        int | None, typer.Option(help="target number of routers, instead of N", show_default=False)
    ] = None,
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = None,
    address: Address = "",
    secret_file: SecretFile = "",
) -> None:
    """Scale expert actors or routers up or down while the cluster serves."""
    from moecluster.cli.commands.operations import scale as run
    from moecluster.cli.common.cluster_choice import chosen

    run(chosen(name, address, secret_file), number, routers, operation_id, wait, make_console())


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE|ACTOR", help="a node, or the name of an expert actor")],
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = None,
    address: Address = "",
    secret_file: SecretFile = "",
) -> None:
    """Move all experts off a node or an actor while they serve; then it can be removed."""
    from moecluster.cli.commands.operations import drain as run
    from moecluster.cli.common.cluster_choice import chosen

    run(chosen(name, address, secret_file), node, operation_id, wait, make_console())


def place(
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="layer/index")],
    actors: Annotated[list[str] | None, typer.Argument(metavar="ACTOR", help="actors to place it on")] = None,
    nowhere: Annotated[bool, typer.Option("--nowhere", help="unload it until a token needs it")] = False,
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = None,
    address: Address = "",
    secret_file: SecretFile = "",
) -> None:
    """Place an expert on exactly these actors while it serves."""
    from moecluster.cli.commands.operations import place as run
    from moecluster.cli.common.cluster_choice import chosen

    run(chosen(name, address, secret_file), expert, actors or (), nowhere, operation_id, wait, make_console())


def update(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="checkpoint of the same shape; with --address as its nodes see it")
    ],
    experts: Annotated[
        list[str] | None,
        typer.Option(help="update only these experts, layer/index or 4/*; may be repeated", show_default=False),
    ] = None,
    keep_trunk: Annotated[bool, typer.Option("--keep-trunk", help="keep the trunk, and update only experts")] = False,
    out: Annotated[
        str,
        typer.Option(
            help="directory for the combined checkpoint of a partial update; default: next to the one served",
            show_default=False,
        ),
    ] = "",
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = None,
    address: Address = "",
    secret_file: SecretFile = "",
) -> None:
    """Update weights while the cluster serves: running requests finish with the old ones, and none fails."""
    from moecluster.cli.commands.update import update as run
    from moecluster.cli.common.cluster_choice import chosen

    run(
        chosen(name, address, secret_file),
        directory,
        experts or (),
        keep_trunk,
        out,
        operation_id,
        wait,
        make_console(),
    )


def plan(
    policy: Annotated[
        str, typer.Option(help="policy to ask; default: the cluster's (controller.policy)", show_default=False)
    ] = "",
    json: Json = False,
    name: Name = None,
    address: Address = "",
    secret_file: SecretFile = "",
) -> None:
    """Show what a policy would change in the cluster now: moves, predicted gain, bytes. Changes nothing."""
    from moecluster.cli.commands.plan import plan as run
    from moecluster.cli.common.cluster_choice import chosen

    run(chosen(name, address, secret_file), policy, json, make_console())


def operations(
    limit: Annotated[int, typer.Option(help="number of operations, newest first; 0: all that are kept", min=0)] = 20,
    json: Json = False,
    name: Name = None,
    address: Address = "",
    secret_file: SecretFile = "",
) -> None:
    """List the controller's current and past operations."""
    from moecluster.cli.commands.operations import operations as run
    from moecluster.cli.common.cluster_choice import chosen

    run(chosen(name, address, secret_file), limit, json, make_console())


def explain(
    operation: Annotated[str, typer.Argument(help="operation id (moecluster operations lists them)")],
    json: Json = False,
    name: Name = None,
    address: Address = "",
    secret_file: SecretFile = "",
) -> None:
    """Explain an operation: its reason, progress, moved bytes, and predicted and measured gain."""
    from moecluster.cli.commands.operations import explain as run
    from moecluster.cli.common.cluster_choice import chosen

    run(chosen(name, address, secret_file), operation, json, make_console())

"""Options that several commands share."""

from typing import Annotated

import typer

Name = Annotated[
    str | None, typer.Option(help="name of the cluster (cluster.name), started on this host", show_default="moecluster")
]
Address = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="instead of --name: the controller's gRPC address of a cluster that runs anywhere",
        show_default=False,
    ),
]
SecretFile = Annotated[
    str,
    typer.Option(help="file with the secret for --address; default: $MOECLUSTER_SECRET_FILE", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

"""Commands that make credentials: they start and reach nothing."""

from pathlib import Path
from typing import Annotated

import typer

from moecluster.cli.common.console import make_console
from moecluster.cli.common.extras import need
from moecluster.rpc.scopes import Scope


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(epilog="Example: moecluster token --scope infer --expires-in 12h --subject ci > ci.token")(token)
    app.command(epilog="Example: moecluster certs ./tls    or: moecluster certs ./tls --renew")(certs)


def token(
    scope: Annotated[
        list[Scope] | None, typer.Option(help="what the token allows; may be repeated", show_default=False)
    ] = None,
    expires_in: Annotated[str, typer.Option(metavar="DURATION", help="lifetime: 30d, 12h, 90m")] = "30d",
    subject: Annotated[
        str, typer.Option(help="name of its holder, which logs may show", show_default="your user name")
    ] = "",
    cluster: Annotated[str, typer.Option("--cluster", "--name", help="name of the cluster")] = "moecluster",
) -> None:
    """Print a token for a part of what the cluster's secret allows. Its file serves wherever the secret's does."""
    from moecluster.cli.commands.token import token as run

    run(scope or (), expires_in, subject, cluster, make_console(stderr=True))


def certs(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="gets ca.crt, tls.crt and tls.key; copy it to every node")
    ],
    renew: Annotated[bool, typer.Option("--renew", help="replace a certificate by a new one of the same CA")] = False,
    days: Annotated[int, typer.Option(help="validity of the certificate", min=1, max=3650)] = 365,
    ca_dir: Annotated[
        Path | None, typer.Option(help="folder of the CA and its private key; not for the nodes", show_default="DIR-ca")
    ] = None,
) -> None:
    """Make the certificates of mutual TLS (security.tls_dir), with a CA of the cluster's own."""
    need("certs", "moecluster certs")
    from moecluster.cli.commands.certs import certs as run

    run(folder, ca_dir, days, renew, make_console())

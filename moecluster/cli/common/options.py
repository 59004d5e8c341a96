"""Options that several commands share."""

from typing import Annotated

import typer

from moecluster.cli.common.completion import clusters

Name = Annotated[str, typer.Option(help="name of the cluster (cluster.name)", autocompletion=clusters)]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

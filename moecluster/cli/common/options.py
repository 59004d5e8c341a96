"""Options that several commands share."""

from typing import Annotated

import typer

Name = Annotated[str, typer.Option(help="name of the cluster (cluster.name)")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

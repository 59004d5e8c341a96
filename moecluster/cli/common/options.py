"""Arguments and options that several commands take."""

from typing import Annotated

import typer

Name = Annotated[str, typer.Option(help="the cluster's name (cluster.name)")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

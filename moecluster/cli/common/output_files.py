"""Optional output files of a command: a JSON report, a plot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.places import check_file
from moecluster.cli.common.extras import need
from moecluster.errors import ConfigError
from moecluster.whole_file import write_whole

PICTURE_ENDINGS = (".png", ".svg", ".pdf")


def check_writable(plot: Path | None, report: Path | None) -> None:
    """Raises ConfigError if a result could not be written, before long work starts."""
    if plot is not None:
        if plot.suffix.lower() not in PICTURE_ENDINGS:
            raise ConfigError(f'--plot: got "{plot}", expected a name that ends in {", ".join(PICTURE_ENDINGS)}')
        need("plots", "--plot")
    for name, path in (("--plot", plot), ("--json", report)):
        if path is not None:
            check_file(name, path)


def write_report(path: Path | None, report: Mapping[str, Any], console: Console) -> None:
    """Writes a report as JSON and prints its path; does nothing without a path."""
    if path is None:
        return
    write_whole(path, f"{json.dumps(report, indent=1, allow_nan=False)}\n".encode())
    console.print(f"every figure: {path}", highlight=False)

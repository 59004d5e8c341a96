"""A shell that needs a file to begin. It is alone here, so that the process of its actor imports little."""

import os
from pathlib import Path

from actors.restart_policy import begins_again
from moecluster.errors import CheckpointError


class NeedyShell:
    """Needs a file, and notes each of its lives."""

    @begins_again
    def __init__(self, needed: str, lives: str) -> None:
        with Path(lives).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if not Path(needed).exists():
            raise CheckpointError(f"{needed} is away")

    def pid(self) -> int:
        return os.getpid()

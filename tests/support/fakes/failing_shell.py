"""A shell that needs a file to start. In a module of its own, so that its actor's process imports little."""

import os
from pathlib import Path

from actors.restart_policy import restart_on_init_failure
from moecluster.errors import CheckpointError


class FailingShell:
    """Needs a file, and records each of its attempts."""

    @restart_on_init_failure
    def __init__(self, needed: str, attempts: str) -> None:
        with Path(attempts).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if not Path(needed).exists():
            raise CheckpointError(f"{needed} is away")

    def pid(self) -> int:
        return os.getpid()

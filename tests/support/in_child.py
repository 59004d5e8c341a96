"""Runs code in a process of its own, under limits that this process must not have."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 200.0
# A finding of one check, with settings as in --set.
CHECK = """
import dataclasses, importlib, json, sys
from moecluster.config import read_config
from moecluster.config.load import override, parse_override
module = importlib.import_module("moecluster.cli.commands.doctor." + sys.argv[1])
config = read_config(override({}, dict(parse_override(text) for text in sys.argv[3:])))
before()
print(json.dumps(dataclasses.asdict(getattr(module, sys.argv[2])(config))))
"""


def finding_of(
    module: str,
    check: str,
    *settings: str,
    before: str = "",
    prefix: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Returns what a check of `moecluster doctor` finds in a process of its own.

    before: statements to run there before the check. prefix: a command that runs the process. prepare: called in the
    process before it starts Python.
    """
    script = "\n".join(["def before():", *(f"    {line}" for line in (before or "pass").splitlines()), CHECK])
    done = subprocess.run(
        [*prefix, sys.executable, "-c", script, module, check, *settings],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True, text=True, timeout=TIMEOUT_S, preexec_fn=prepare,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def mounted(options: str, folder: str | Path) -> tuple[str, ...]:
    """Returns the prefix of a command that sees a tmpfs of these mount options in a folder. Skips the test where no
    mount namespace can be made."""
    prefix = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {options} none "{folder}" && exec "$0" "$@"')
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if tried.returncode:
        pytest.skip(f"no mount namespace of its own: {tried.stderr.strip()}")
    return prefix

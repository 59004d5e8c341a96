"""A command whose standard output is closed, as `>&-` does, works as with any other."""

import subprocess
import sys


def test_a_command_without_a_standard_output_ends_well() -> None:
    program = "from moecluster.cli.app import main; main()"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" --version >&-', sys.executable, program],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")

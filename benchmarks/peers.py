"""Other systems that cannot share moecluster's environment. Each gets its own, created on first use."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
HIVEMIND_HOME = ROOT / ".peers" / "hivemind"
HIVEMIND_VERSION = "1.1.12"


class PeerUnavailable(Exception):
    """Another system's environment could not be created."""


def hivemind_python() -> Path:
    """Returns the Python of an environment with hivemind and the same torch version as here.

    Creates the environment if needed (about a minute). Raises PeerUnavailable.
    """
    stamp = HIVEMIND_HOME / f"installed-{HIVEMIND_VERSION}"
    python = HIVEMIND_HOME / "bin" / "python"
    if not stamp.exists():
        torch_version = metadata.version("torch").split("+")[0]
        try:
            _run(sys.executable, "-m", "venv", "--clear", str(HIVEMIND_HOME))
            _run(str(python), "-m", "pip", "install", "-q", f"torch=={torch_version}", f"hivemind=={HIVEMIND_VERSION}")
        except subprocess.CalledProcessError as exc:
            last_line = (exc.stderr.strip().splitlines() or ["no output"])[-1]
            raise PeerUnavailable(f"hivemind {HIVEMIND_VERSION} could not be installed: {last_line}") from exc
        stamp.touch()
    return python


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)

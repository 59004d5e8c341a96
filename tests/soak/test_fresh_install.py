"""The wheel in a fresh environment without the checkout: all that it needs is installed, and `moecluster demo` runs.

Minutes and gigabytes: pip installs torch and Ray anew. In the environment of a user: with no variable of this session,
with its home in a temporary folder.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moecluster

ROOT = Path(__file__).resolve().parents[2]
INSTALL_S, DEMO_S = 3600.0, 1800.0
STEPS = 20


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment into which the wheel was installed, with its extras and the tested versions."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)], folder)
    run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    command = [str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    run([*command, "--constraint", str(ROOT / "constraints.txt"), f"{wheel}[plots,serve]"], folder, timeout_s=INSTALL_S)
    return folder


def run(command: list[str], folder: Path, *, timeout_s: float = 600.0) -> str:
    """Returns what a command prints, run in a folder without this session's Python and Ray variables."""
    mine = ("RAY_", "PYTHON", "VIRTUAL_ENV", "XDG_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    done = subprocess.run(
        command, cwd=folder, env=variables | {"XDG_STATE_HOME": str(folder / "state")}, capture_output=True, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def test_commands_run_out_of_a_fresh_environment(environment: Path) -> None:
    command = str(environment / "venv/bin/moecluster")
    where = run(
        [str(environment / "venv/bin/python"), "-c", "import moecluster; print(moecluster.__file__)"], environment
    )
    assert where.startswith(str(environment / "venv"))
    assert run([command, "--version"], environment) == f"moecluster {moecluster.__version__}\n"
    assert "total parameters" in run([command, "params", "mixtral"], environment)
    assert "Train a small model" in run([command, "demo", "--help"], environment)
    assert "a cluster can start here" in run([command, "doctor", "demo"], environment)


def test_the_demo_runs_out_of_a_fresh_environment(environment: Path) -> None:
    command = [str(environment / "venv/bin/moecluster"), "demo", "-s", f"train.steps={STEPS}"]
    said = run(command, environment, timeout_s=DEMO_S)
    assert f"{STEPS}" in said and "loss" in said, said
    print(said[-3000:])

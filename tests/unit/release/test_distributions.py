"""Wheel and sdist: exactly the packages, whole metadata, and a command that runs out of the wheel alone."""

import json
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import moecluster
from moecluster.config.load import preset_names

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"moecluster-{moecluster.__version__}"
# Without `site`, so that neither this checkout nor what else is installed editable is found.
RUN = """
import contextlib, importlib, io, json, pkgutil, sys
sys.path[:0] = [sys.argv[1]]
sys.path.append(sys.argv[2])
import actors, moecluster
from moecluster.cli.app import main
said = {}
for line in ("--version", "demo --help", "doctor --help", "plan --name second", "train nowhere"):
    sys.argv = ["moecluster", *line.split()]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as ended:
            said[line] = (ended.code, out.getvalue())
from moecluster.config.load import load_config, preset_names
for name in preset_names():
    load_config(name)
modules = []
for package in (moecluster, actors):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        modules.append(importlib.import_module(found.name).__file__)
print(json.dumps({"said": said, "presets": preset_names(), "modules": modules}))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist, and of the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build(folder)
    return folder


def build(folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    return dist / f"{NAME}.tar.gz"


def files_of_packages() -> set[str]:
    return {
        str(file.relative_to(ROOT))
        for package in ("moecluster", "actors")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(f"{NAME}.dist-info/METADATA"))


def test_the_wheel_holds_exactly_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - about == files_of_packages()
    assert {Path(name).name for name in about} == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}
    for needed in ("moecluster/py.typed", "actors/py.typed", "moecluster/proto/expert_pb2.pyi"):
        assert needed in names
    assert sum(name.startswith("moecluster/config/presets/") for name in names) == len(preset_names())


def test_the_sdist_holds_what_builds_the_same_wheel_and_no_tests(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    others = {name for name in names if not name.startswith(("moecluster/", "actors/", "protos/"))}
    assert others == {
        *("pyproject.toml", "PKG-INFO", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", ".gitignore")
    }
    assert names >= files_of_packages()
    build(tmp_path, "--wheel")  # out of the checkout itself
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_metadata_is_what_pyproject_says(wheel: Path, dist: Path) -> None:
    about = metadata_of(wheel)
    assert about["Version"] == moecluster.__version__
    assert about["Requires-Python"] == PROJECT["requires-python"]
    assert about["License-Expression"] == PROJECT["license"]
    assert set(about.get_all("Provides-Extra", [])) == PROJECT["optional-dependencies"].keys()
    plain = [text for text in about.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert len(plain) == len(PROJECT["dependencies"])
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_the_version_is_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"]
    found = [
        file.relative_to(ROOT)
        for file in (*(ROOT / "moecluster").rglob("*.py"), *(ROOT / "actors").rglob("*.py"), ROOT / "pyproject.toml")
        if f'"{moecluster.__version__}"' in file.read_text()
    ]
    assert found == [Path("moecluster/__init__.py")]


def test_the_command_runs_out_of_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    entry = (unpacked / f"{NAME}.dist-info" / "entry_points.txt").read_text()
    assert "moecluster = moecluster.cli.app:main" in entry
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, str(unpacked), sysconfig.get_path("purelib")],
        cwd=tmp_path, env={"XDG_STATE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {Path(file).is_relative_to(unpacked) for file in found["modules"]} == {True}
    assert tuple(found["presets"]) == preset_names()
    said = found["said"]
    assert said["--version"] == [0, f"moecluster {moecluster.__version__}\n"]
    assert said["demo --help"][0] == said["doctor --help"][0] == 0 and "Train a small model" in said["demo --help"][1]
    assert said["plan --name second"][0] == 3 and "no cluster second is up" in said["plan --name second"][1]
    assert said["train nowhere"][0] == 2

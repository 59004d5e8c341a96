"""Checks Python, the installed packages, Ray's programs, torch and the text encoding.

Imports little: it must tell which package is missing although that package is missing.
"""

import locale
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moecluster.cli.commands.doctor.finding import Check, Finding, ok, problem, warning
from moecluster.cli.common.extras import EXTRAS
from moecluster.config import Config

PACKAGE = "moecluster"
RAY_PROGRAMS = ("raylet/raylet", "gcs/gcs_server")  # in the package, below core/src/ray
PROGRAM_TIMEOUT_S = 30.0
TORCH_TIMEOUT_S = 300.0  # its first import on a busy machine
# In a process of its own: a build for other processors dies by a signal.
TORCH_SCRIPT = "import torch; a = torch.ones(4, 4); assert float((a @ a).sum()) == 64.0; print(torch.__version__)"


def python(config: Config) -> Finding:
    """Python's version."""
    wanted, *_ = metadata.metadata(PACKAGE).get_all("Requires-Python") or [""]
    found = f"Python {platform.python_version()} on {platform.system()} {platform.release()}"
    if sys.platform != "linux":
        return problem(found, "moecluster runs on Linux only")
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return problem(found, f"install Python {wanted}, and moecluster into it")
    return ok(found)


def packages(config: Config) -> Finding:
    """The packages that moecluster always needs, by their versions."""
    wrong = list(_unmet(""))
    if wrong:
        return problem(f"moecluster {_version()}; {'; '.join(wrong)}", "pip install --upgrade moecluster")
    return ok(f"moecluster {_version()} and all that it needs")


def extras(config: Config) -> Finding:
    """The optional packages. One that is not installed is no fault; one of a wrong version is."""
    missing, wrong = [], []
    for extra, wanted in EXTRAS.items():
        if all(find_spec(package) is None for package in wanted):
            missing.append(extra)
        elif unmet := list(_unmet(extra)):
            wrong.append(extra)
            missing += unmet
    said = "; ".join(f"{name} is not installed" if name in EXTRAS else name for name in missing)
    if wrong:
        return warning(said, f"pip install --upgrade 'moecluster[{','.join(wrong)}]'")
    return ok(said or f"{', '.join(EXTRAS)} are installed")


def ray(config: Config) -> Finding:
    """Ray's version, and whether its programs start."""
    spec = find_spec("ray")
    if spec is None or not spec.submodule_search_locations:
        return problem("ray is not installed", "pip install --upgrade moecluster")
    version = metadata.version("ray")
    again = f"install it again: pip install --force-reinstall --no-deps ray=={version}"
    core = Path(spec.submodule_search_locations[0]) / "core" / "src" / "ray"
    starter = Path(sys.executable).parent / "ray"  # what a local Ray is started with
    for program, arguments in ((starter, None), *((core / name, ["--version"]) for name in RAY_PROGRAMS)):
        if not program.is_file():
            return problem(f"Ray {version} lacks {program}", again)
        if not os.access(program, os.X_OK):
            return problem(f"{program} may not be executed", f"chmod +x {program}, or mount its folder without noexec")
        if arguments is not None and (failure := _failure_of([str(program), *arguments], PROGRAM_TIMEOUT_S)[1]):
            return problem(f"{program} does not start: {failure}", again)
    return ok(f"Ray {version}; raylet and gcs_server start")


def torch(config: Config) -> Finding:
    """Whether torch computes."""
    output, failure = _failure_of([sys.executable, "-c", TORCH_SCRIPT], TORCH_TIMEOUT_S)
    if failure:
        return problem(f"torch does not compute: {failure}", "install a build of torch for this machine")
    return ok(f"torch {output} computes")


def encoding(config: Config) -> Finding:
    """The encoding of texts that are printed and of file names."""
    found = {locale.getpreferredencoding(False), sys.getfilesystemencoding(), sys.stdout.encoding or "utf-8"}
    other = sorted(name for name in found if name.lower().replace("-", "") != "utf8")
    if other:
        return warning(
            f"texts are encoded as {', '.join(other)}",
            "what a model generates may not be printable: set LC_ALL=C.UTF-8, or PYTHONUTF8=1",
        )
    return ok("UTF-8")


def _version() -> str:
    return metadata.version(PACKAGE)


def _unmet(extra: str) -> Iterator[str]:
    """Yields what is missing or of a wrong version among the requirements of an extra; "": those of the package."""
    for text in metadata.requires(PACKAGE) or ():
        wanted = Requirement(text)
        if not _applies(wanted, extra):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield f"{wanted.name} is not installed"
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name} is {version}, not {wanted.specifier}"


def _applies(wanted: Requirement, extra: str) -> bool:
    """Whether it is a requirement of the extra in this environment, and of that extra alone."""
    of_extra = wanted.marker is not None and re.search(r"\bextra\b", str(wanted.marker)) is not None
    if of_extra != bool(extra):
        return False
    try:
        return wanted.marker is None or wanted.marker.evaluate({"extra": extra})
    except UndefinedEnvironmentName:
        return False


def _failure_of(command: list[str], timeout_s: float) -> tuple[str, str]:
    """Runs a command; returns (what it printed, why it failed), the latter empty if it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "", f"it did not end within {timeout_s:g} s"
    except OSError as exc:
        return "", exc.strerror or str(exc)
    if done.returncode < 0:
        return "", f"ended by signal {-done.returncode}"
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return done.stdout.strip(), (lines[-1] if lines else f"exit {done.returncode}") if done.returncode else ""


CHECKS = (
    Check(name="Python", run=python),
    Check(name="packages", run=packages),
    Check(name="extras", run=extras),
    Check(name="Ray", run=ray),
    Check(name="torch", run=torch),
    Check(name="encoding", run=encoding),
)

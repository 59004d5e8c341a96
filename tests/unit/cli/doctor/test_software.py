"""doctor: Python, packages, Ray's programs, torch and the encoding, each really broken."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moecluster.cli.commands.doctor import software
from moecluster.cli.commands.doctor.finding import Level
from moecluster.config import Config
from tests.support.in_child import finding_of

Installed = Callable[..., Path]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Installs a distribution of a name and version that goes before the real one; returns its folder."""

    def install(name: str, version: str, *lines: str) -> Path:
        about = tmp_path / f"{name}-{version}.dist-info"
        about.mkdir()
        metadata = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines]
        (about / "METADATA").write_text("\n".join(metadata) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    return install


def test_this_environment_has_all_that_moecluster_needs() -> None:
    for check in (software.python, software.packages, software.extras, software.ray):
        assert check(Config()).level is Level.OK, check(Config())


def test_a_python_that_is_too_old_is_a_problem(installed: Installed) -> None:
    installed("moecluster", "0.1.0", "Requires-Python: >=3.99")
    found = software.python(Config())
    assert found.level is Level.PROBLEM and "install Python >=3.99" in found.advice


def test_a_missing_package_and_a_wrong_version_are_named(installed: Installed) -> None:
    installed(
        "moecluster",
        "0.1.0",
        "Requires-Dist: no-such-package>=2",
        "Requires-Dist: rich<1",
        "Requires-Dist: typer",
        'Requires-Dist: also-absent; python_version < "3"',
        'Requires-Dist: absent-too; extra == "serve"',
    )
    found = software.packages(Config())
    assert found.level is Level.PROBLEM and found.advice == "pip install --upgrade moecluster"
    assert "no-such-package is not installed" in found.found and "rich is 15.0.0, not <1" in found.found
    assert "typer" not in found.found and "absent" not in found.found


def test_an_extra_is_judged_only_if_it_is_there(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("moecluster", "0.1.0", 'Requires-Dist: fastapi>=99; extra == "serve"')
    found = software.extras(Config())
    assert found.level is Level.WARNING and "not >=99" in found.found and "moecluster[serve]" in found.advice
    monkeypatch.setattr(software, "EXTRAS", {"serve": ("no_such_package_a", "no_such_package_b")})
    found = software.extras(Config())
    assert (found.level, found.found) == (Level.OK, "serve is not installed")


@pytest.mark.parametrize(
    ("mode", "content", "expected"),
    [
        (0o644, "#!/bin/sh\n", "may not be executed"),
        (0o755, "#!/bin/sh\necho GLIBC_9.9 not found >&2\nexit 1\n", "does not start: GLIBC_9.9 not found"),
        (0o755, "#!/bin/sh\nkill -ILL $$\n", "does not start: ended by signal 4"),
        (0o755, "no program", "does not start: Exec format error"),
        (None, "", "lacks"),
    ],
)
def test_a_ray_whose_programs_do_not_start_is_a_problem(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, mode: int | None, content: str, expected: str
) -> None:
    folder = installed("ray", "2.60.0")
    core = folder / "ray" / "core" / "src" / "ray"
    for program in software.RAY_PROGRAMS:
        (core / program).parent.mkdir(parents=True)
        if mode is not None:
            (core / program).write_text(content)
            (core / program).chmod(mode)
    (folder / "ray" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "ray")
    found = software.ray(Config())
    assert found.level is Level.PROBLEM and expected in found.found, found
    assert found.advice


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("raise ImportError('libgomp.so.1: cannot open shared object file')", "libgomp.so.1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended by signal 4"),
    ],
)
def test_a_torch_that_does_not_compute_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, expected: str
) -> None:
    (tmp_path / "torch.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = software.torch(Config())
    assert found.level is Level.PROBLEM and expected in found.found


def test_another_encoding_is_a_warning() -> None:
    assert finding_of("software", "encoding")["level"] == "ok"
    found = finding_of("software", "encoding", environment={"PYTHONIOENCODING": "latin-1"})
    assert found["level"] == "warning" and "iso8859-1" in found["found"] and "PYTHONUTF8=1" in found["advice"]

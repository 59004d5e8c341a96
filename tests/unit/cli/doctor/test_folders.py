"""doctor: folders that cannot be written, or have no room."""

from pathlib import Path

import pytest

from moecluster.cli.commands.doctor import folders
from moecluster.cli.commands.doctor.finding import Level
from moecluster.config import Config, read_config
from tests.support.in_child import finding_of, mounted

SHORT = "/var/tmp"  # a path that Ray's sockets fit behind; the tests mount a file system of their own there


def test_folders_with_room_are_ok_and_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = read_config({"train": {"output_dir": str(tmp_path / "runs" / "a")}})
    for check in (folders.state, folders.output):
        assert str(tmp_path) in check(config).found
    assert folders.state(config).level is Level.OK
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    found = folders.state(Config())
    assert found.level is Level.PROBLEM and "Not a directory" in found.found and "XDG_STATE_HOME" in found.advice
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert folders.state(Config()).level is Level.PROBLEM
    found = folders.output(read_config({"train": {"output_dir": str(tmp_path / "file" / "runs")}}))
    assert found.level is Level.WARNING and "train.output_dir" in found.advice


def test_a_file_system_without_room_is_told() -> None:
    small = {"TMPDIR": SHORT, "XDG_STATE_HOME": SHORT}
    for check, options, level, expected in (
        ("sockets", "size=16m", "warning", "only 16.8 MB are free"),
        ("state", "size=64k", "warning", "only 65.5 kB are free"),
        ("state", "nr_inodes=1", "problem", SHORT),
        ("state", "ro", "problem", "Read-only"),
    ):
        found = finding_of("folders", check, prefix=mounted(options, SHORT), environment=small)
        assert found["level"] == level and expected in found["found"], found


def test_a_file_system_above_rays_limit_is_told() -> None:
    fill = f"import os; os.posix_fallocate(os.open('{SHORT}/large', os.O_CREAT | os.O_RDWR), 0, 31 * 2**20)"
    prefix = mounted("size=32m", SHORT)
    found = finding_of("folders", "sockets", before=fill, prefix=prefix, environment={"TMPDIR": SHORT})
    assert found["level"] == "warning" and "97% full" in found["found"], found

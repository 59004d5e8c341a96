import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moecluster.rpc.checkpoint import locked_folder
from moecluster.rpc.checkpoint.locked_folder import PREFIX, HeldFolder

HOLDER = """
import signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from moecluster.rpc.checkpoint.locked_folder import HeldFolder
folder = HeldFolder()
print(folder.path, flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(locked_folder, "NEW_S", 0.0)
    return tmp_path


def test_a_folder_goes_with_its_last_user() -> None:
    folder = HeldFolder()
    path = folder.path
    (path / "config.json").write_text("{}")
    del folder
    assert not path.exists()
    folder = HeldFolder()
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


def test_a_folder_that_a_kill_left_behind_goes_with_the_next_one(temporary: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(temporary)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    first = HeldFolder()
    assert left.is_dir(), "its process is there"
    holder.kill()
    holder.wait()
    second = HeldFolder()
    assert not left.exists()
    assert first.path.is_dir() and second.path.is_dir()


def test_what_is_no_folder_of_ours_stays(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    (temporary / f"{PREFIX}file").write_text("")
    folder = HeldFolder()
    assert elsewhere.is_dir()
    assert {p.name for p in temporary.iterdir()} == {"elsewhere", f"{PREFIX}link", f"{PREFIX}file", folder.path.name}

import os
import stat
import threading
from pathlib import Path

import pytest

from moecluster.whole_file import write_whole, writing_whole


def test_a_file_is_replaced_in_one_step_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")
    path.chmod(0o662)  # with bits that the umask takes from new files
    with writing_whole(path) as aside:
        assert aside.suffix == ".json" and aside.parent == tmp_path, "its ending may say how it is written"
        aside.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and stat.S_IMODE(path.stat().st_mode) == 0o662
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")
    (tmp_path / ".report.new.json").write_text("left by a process that was killed")
    with pytest.raises(ZeroDivisionError), writing_whole(path) as aside:
        aside.write_text("half of it")
        raise ZeroDivisionError
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"] and path.read_text() == "before"


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        write_whole(tmp_path / "none" / "report.json", b"")
    assert caught.value.filename == str(tmp_path / "none" / "report.json")


def test_a_users_link_is_followed_and_a_secrets_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_whole(link, b"report")
    assert link.is_symlink() and target.read_bytes() == b"report"
    write_whole(link, b"secret", mode=0o600)
    assert not link.is_symlink() and target.read_bytes() == b"report"
    assert stat.S_IMODE(link.stat().st_mode) == 0o600


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"report")
    reader.join()
    assert found == [b"report"] and stat.S_ISFIFO(pipe.stat().st_mode)

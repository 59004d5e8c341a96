"""What is packed as a job's working directory, and what never is."""

import os
import zipfile
from pathlib import Path

import pytest

from moecluster.cli.common import working_dir
from moecluster.cli.common.working_dir import pack
from moecluster.errors import ConfigError


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def packed_names(folder: Path, tmp_path: Path, *exclude: str) -> set[str]:
    packed = pack(folder, tmp_path / "package.zip", exclude=exclude)
    with zipfile.ZipFile(packed.path) as archive:
        names = archive.namelist()
        assert len(names) == packed.files
        assert packed.total_bytes == sum(info.file_size for info in archive.infolist())
        assert all(archive.read(name) == (folder / name).read_bytes() for name in names)
    return set(names)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    return tmp_path / "job"


def test_files_without_secrets_and_caches(folder: Path, tmp_path: Path) -> None:
    write(folder, "train.toml", "corpus/a.txt", "corpus/deep/b.txt", ".hidden")
    write(folder, ".git/config", ".venv/bin/python", "a/__pycache__/a.pyc", "node_modules/x/index.js")
    write(folder, ".env", ".env.local", "tls.key", "certs/ca.pem", "moecluster.secret", ".ray/auth_token", ".ssh/id")
    write(folder, "keys/id_ed25519", "keys/id_ed25519.pub", ".aws/credentials")
    assert packed_names(folder, tmp_path) == {"train.toml", "corpus/a.txt", "corpus/deep/b.txt", ".hidden"}


def test_ignore_files_of_every_folder_and_given_patterns(folder: Path, tmp_path: Path) -> None:
    write(
        folder, "a.txt", "runs/x", "data/keep", "data/drop", "data/sub/drop", "data/sub/keep.log", "big.bin", "b/runs"
    )
    (folder / ".gitignore").write_text("/runs/\n*.log\n")
    (folder / "data" / ".rayignore").write_text("/drop\n")
    found = packed_names(folder, tmp_path, "*.bin")
    assert found == {".gitignore", "a.txt", "data/.rayignore", "data/keep", "data/sub/drop", "b/runs"}


def test_equal_files_make_an_equal_package(folder: Path, tmp_path: Path) -> None:
    write(folder, "b", "a")
    first = pack(folder, tmp_path / "1.zip").path.read_bytes()
    os.utime(folder / "a", (1, 1))
    assert pack(folder, tmp_path / "2.zip").path.read_bytes() == first
    write(folder, "c")
    assert pack(folder, tmp_path / "3.zip").path.read_bytes() != first


def test_programs_stay_executable(folder: Path, tmp_path: Path) -> None:
    write(folder, "run.sh", "data")
    (folder / "run.sh").chmod(0o700)
    with zipfile.ZipFile(pack(folder, tmp_path / "package.zip").path) as archive:
        modes = {info.filename: info.external_attr >> 16 & 0o777 for info in archive.infolist()}
    assert modes == {"run.sh": 0o755, "data": 0o644}


def test_too_large_names_the_largest_and_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_dir, "MAX_BYTES", 100)
    write(folder, "small")
    (folder / "model.safetensors").write_bytes(bytes(200))
    with pytest.raises(ConfigError, match=r"2 files of 205 bytes.*largest are model.safetensors \(200 bytes\), small"):
        pack(folder, tmp_path / "package.zip")
    assert not (tmp_path / "package.zip").exists()


def test_too_many_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_dir, "MAX_FILES", 2)
    write(folder, "a", "b", "c")
    with pytest.raises(ConfigError, match="3 files of 3 bytes, and a job's may have 2"):
        pack(folder, tmp_path / "package.zip")


def test_links_stay_inside(folder: Path, tmp_path: Path) -> None:
    write(folder, "a", "sub/b")
    (folder / "link").symlink_to("sub/b")
    assert packed_names(folder, tmp_path) == {"a", "sub/b", "link"}
    (folder / "out").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="out leads out of the directory"):
        pack(folder, tmp_path / "package.zip")
    assert packed_names(folder, tmp_path, "out") == {"a", "sub/b", "link"}
    (folder / "loop").symlink_to(".")
    with pytest.raises(ConfigError, match="loop is a link to a folder"):
        pack(folder, tmp_path / "package.zip", exclude=["out"])


def test_whatever_is_no_file_is_refused(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigError, match="pipe is no file"):
        pack(folder, tmp_path / "package.zip")


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'--working-dir: got ".*nowhere", expected a directory'):
        pack(tmp_path / "nowhere", tmp_path / "package.zip")

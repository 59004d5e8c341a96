"""Unusable output locations: a command fails with one line that says what would work, before it starts anything."""

import os
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors import cluster_file, launch, places
from actors.cluster_file import UpCluster
from actors.places import (
    BEHIND_SOCKET_FOLDER_BYTES,
    MAX_SOCKET_PATH_BYTES,
    check_file,
    check_folder,
    longest_socket_parent_bytes,
    make_socket_folder,
    name_socket_folder,
)
from moecluster.cli.app import main
from moecluster.errors import ConfigError, ResourceError
from tests.support.clusters.fake_actors import save_tiny_model

BATCH_SYSTEM = "scratch-of-a-batch-system/people/a_longish_user_name/job_1355700/tmp.node0016"


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], Path]:
    def use(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        return folder

    return use


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Runs the command line, which must start nothing and fail with a user error; returns its one line."""

    def nothing_starts(*_: object) -> None:
        pytest.fail("something is started")

    monkeypatch.setattr(launch, "start_local_ray", nothing_starts)
    monkeypatch.setattr("actors.local_ray.subprocess.run", nothing_starts)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["moecluster", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert ended.value.code == 2, output
        assert output.err.startswith("moecluster: ") and output.err.count("\n") == 1, output.err
        return output.err

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("below", [BATCH_SYSTEM, "x" * 200, "ä" * 60, "."])
def test_sockets_have_room_whatever_the_temporary_folder_is(temporary, tmp_path, below) -> None:
    temporary(tmp_path / below)
    folder = make_socket_folder()
    try:
        assert len(os.fsencode(folder)) + BEHIND_SOCKET_FOLDER_BYTES <= MAX_SOCKET_PATH_BYTES
        found = Path(folder).stat()
        assert stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.getuid()
    finally:
        os.rmdir(folder)


def test_a_short_temporary_folder_is_taken(temporary) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="m") as short:
        assert len(short) <= longest_socket_parent_bytes()
        temporary(Path(short))
        assert Path(make_socket_folder()).parent == Path(short)
        assert not Path(name_socket_folder()).exists(), "it is named only"


def test_a_temporary_folder_that_refuses_is_passed_over(monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    folder = make_socket_folder()
    assert Path(folder).parent == Path("/tmp")
    os.rmdir(folder)


def test_without_any_place_for_sockets_one_line_says_what_to_set(monkeypatch, temporary, tmp_path) -> None:
    temporary(tmp_path / BATCH_SYSTEM)
    long = tempfile.tempdir
    monkeypatch.setattr(places, "_socket_parents", lambda: [long, "/proc"])
    with pytest.raises(ResourceError, match=r"no place for Ray's sockets .*is too long; /proc: .*set TMPDIR to") as why:
        make_socket_folder()
    assert "107" in str(why.value) and "\n" not in str(why.value)


@pytest.mark.parametrize("command", ["up", "serve", "train", "generate"])
@pytest.mark.parametrize(
    "place", ["/proc/nowhere", "{tmp}/file", "{tmp}/file/below", "{tmp}/" + "x" * 300, "{tmp}/loop"]
)
def test_no_place_for_the_state_is_said_before_anything_is_started(
    complaint, monkeypatch, tmp_path, model, command, place
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path)
    place = place.format(tmp=tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", place)
    monkeypatch.setattr("moecluster.cli.commands.serve._listen", lambda config: pytest.fail("something listens"))
    output = complaint(command, model, *(("x",) if command == "generate" else ()))
    assert place in output and "set XDG_STATE_HOME" in output


def test_up_does_not_write_a_model_before_it(complaint, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    for command in ("up", "train", "demo"):
        assert "/proc/nowhere" in complaint(command)
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_not_there_or_not_ours(complaint, monkeypatch, model) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc")
    assert "/proc/.local/state/moecluster" in complaint("up", model)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert "set XDG_STATE_HOME" in complaint("up", model)
    assert "set XDG_STATE_HOME" in complaint("status")


def test_a_relative_state_directory_is_refused(complaint, monkeypatch, model) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert 'XDG_STATE_HOME: got "state", expected an absolute path' in complaint("up", model)


def test_what_cannot_be_noted_or_read_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    up = UpCluster(
        name="one", ray_address="a:1", model="m", router_addresses=("a:2",), controller_address="a:3", local_ray=None
    )
    with pytest.raises(ResourceError, match=r"file/moecluster, which cannot be made or written"):
        cluster_file.save(up)
    assert cluster_file.load("one") is None
    assert cluster_file.load("x" * 300) is None
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "loop"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ResourceError, match=r"one\.json cannot be read"):
        cluster_file.load("one")


def test_a_run_is_told_of_its_folder_before_its_text_is_read(complaint, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    for command in ("train", "demo"):
        output = complaint(command, "--data", "nowhere.txt", "--set", "train.output_dir=/proc/runs")
        assert 'train.output_dir: "/proc/runs" cannot be written' in output


def test_outputs_are_told_before_the_work(complaint, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "in.jsonl").write_text("{}\n")
    long = tmp_path / ("x" * 300 + ".json")
    for option, arguments in (
        ("--json", ("simulate", "--json", "/proc/x.json")),
        ("--json", ("simulate", "--json", long)),
        ("--plot", ("simulate", "--plot", "/proc/x.png")),
        ("--trace", ("simulate", "--trace", "/proc/x.jsonl")),
        ("--json", ("bench", "serve", "--json", "/proc/x.json")),
        ("--plot", ("bench", "serve", "--plot", "/nowhere/x.png")),
        ("OUT", ("record", "/proc/x.jsonl")),
        ("OUT", ("batch", tmp_path / "in.jsonl", "/proc/out.jsonl")),
    ):
        assert complaint(*arguments).startswith(f"moecluster: {option}: ")


def test_a_check_leaves_nothing_and_touches_nothing(tmp_path) -> None:
    check_folder("train.output_dir", str(tmp_path / "a" / "b"))
    check_file("--json", tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("figures")
    os.mkfifo(tmp_path / "pipe")
    for name in ("old.json", "pipe"):
        check_file("--json", tmp_path / name)
    assert (tmp_path / "old.json").read_text() == "figures"
    (tmp_path / "dangling").symlink_to("/proc/nowhere")
    for wrong in (tmp_path, tmp_path / "old.json" / "x", tmp_path / "dangling"):
        with pytest.raises(ConfigError, match="--json: "):
            check_file("--json", wrong)
    with pytest.raises(ConfigError, match=r"train\.output_dir"):
        check_folder("train.output_dir", str(tmp_path / "dangling"))

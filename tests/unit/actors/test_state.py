"""The state files of running clusters, including those of earlier versions."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from actors import cluster_file
from actors.cluster_file import Start, UpCluster
from actors.local_ray import LocalRay
from moecluster.errors import ResourceError
from moecluster.rpc.credentials import state_folder

RAY = LocalRay(address="127.0.0.1:6379", mark="m", folder="/tmp/ray", auth="token")
UP = UpCluster(
    name="one",
    ray_address="127.0.0.1:6379",
    model="/models/tiny",
    router_addresses=("127.0.0.1:5001", "127.0.0.1:5002"),
    controller_address="127.0.0.1:5003",
    local_ray=RAY,
)

PLANNED = replace(RAY, address="")
START = Start(name="one", ray_address="", model="/models/tiny", pid=4711, pid_start_ticks=15, local_ray=PLANNED)
HOLD_LOCK = (
    "from actors.cluster_file import start_lock\nwith start_lock('one') as ours: print(ours, flush=True); input()"
)


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_what_is_saved_is_found_by_its_name_until_it_is_forgotten() -> None:
    cluster_file.save(UP)
    assert cluster_file.load("one") == UP and UP.router_address == "127.0.0.1:5001"
    assert cluster_file.load("another") is None
    cluster_file.forget("one")
    cluster_file.forget("one")
    assert cluster_file.load("one") is None


def test_a_file_that_names_a_single_router_is_read() -> None:
    cluster_file.save(UP)
    file = state_folder() / "one.json"
    fields = json.loads(file.read_text())
    fields["router_address"] = fields.pop("router_addresses")[0]
    file.write_text(json.dumps(fields))
    loaded = cluster_file.load("one")
    assert loaded is not None and loaded.router_addresses == ("127.0.0.1:5001",)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"name": "one", "local_ray": null}', '{"local_ray": {"mark": 1}}']
)
def test_a_file_that_cannot_be_read_is_named(content: str) -> None:
    cluster_file.save(UP)
    (state_folder() / "one.json").write_text(content)
    with pytest.raises(ResourceError, match=r"one\.json cannot be read .* remove it if no cluster one is up"):
        cluster_file.load("one")


def test_a_start_is_not_up_until_it_is_noted_as_up() -> None:
    cluster_file.save(START)
    assert cluster_file.load("one") is None and cluster_file.load_start("one") == START
    cluster_file.save(UP)
    assert cluster_file.load("one") == UP and cluster_file.load_start("one") is None


def test_a_start_that_an_older_version_noted_is_taken_for_one_that_has_ended() -> None:
    cluster_file.save(START)
    file = state_folder() / "one.json"
    fields = json.loads(file.read_text())
    del fields["pid_start_ticks"]
    file.write_text(json.dumps({**fields, "pid_started_s": 1.5}))
    assert cluster_file.load_start("one") == replace(START, pid_start_ticks=0)


def test_a_lock_is_held_by_one_process_and_released_however_it_ends() -> None:
    assert not cluster_file.is_starting("one")
    with subprocess.Popen([sys.executable, "-c", HOLD_LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"True\n"
        assert cluster_file.is_starting("one") and not cluster_file.is_starting("two")
        with cluster_file.start_lock("one", patience_s=0.0) as ours:
            assert not ours
        holder.kill()
        holder.wait()
    assert not cluster_file.is_starting("one")
    with cluster_file.start_lock("one", patience_s=0.0) as ours:
        assert ours


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match=r"noted in .*/file/moecluster, which .* set XDG_STATE_HOME"):
        cluster_file.save(START)
    with pytest.raises(ResourceError, match="set XDG_STATE_HOME"), cluster_file.start_lock("one"):
        pass

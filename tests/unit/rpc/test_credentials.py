"""The cluster secret or a token, in memory and in its file: only its owner can read it, and nothing prints it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from actors import cluster_file, launch
from actors.cluster_file import UpCluster
from moecluster.client import local_credentials
from moecluster.errors import ConfigError, ResourceError
from moecluster.rpc.credentials import ClusterCredentials, private_folder, read_secret, secret_path, write_secret


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_nothing_shows_the_secret() -> None:
    credentials = ClusterCredentials.make()
    assert credentials.secret not in f"{credentials} {credentials!r} {[credentials]} {vars(type(credentials))}"
    assert credentials != ClusterCredentials.make() and len(credentials.secret) >= 43
    with pytest.raises(ConfigError) as caught:
        ClusterCredentials(secret="short but mine")
    assert "short but mine" not in str(caught.value)
    token = ClusterCredentials(token="header.claims.signature")
    assert "claims" not in f"{token} {token!r}" and token.metadata == (
        ("authorization", "Bearer header.claims.signature"),
    )
    for wrong in ({"token": "no token, but mine"}, {}, {"secret": "k" * 43, "token": "a.b.c"}):
        with pytest.raises(ConfigError) as caught:
            ClusterCredentials(**wrong)
        assert "mine" not in str(caught.value) and "k" * 43 not in str(caught.value)


def test_a_token_is_read_from_a_file_like_the_secret(tmp_path: Path) -> None:
    file = tmp_path / "ci.token"
    file.write_text("header.claims.signature\n")
    file.chmod(0o600)
    assert read_secret(file) == ClusterCredentials(token="header.claims.signature")
    write_secret(tmp_path / "own" / "again", read_secret(file))
    assert read_secret(tmp_path / "own" / "again") == read_secret(file)


def test_the_file_is_its_owners_alone_whatever_the_umask() -> None:
    credentials = ClusterCredentials.make(cluster="one")
    before = os.umask(0)
    try:
        write_secret(secret_path("one"), credentials)
    finally:
        os.umask(before)
    assert stat.S_IMODE(secret_path("one").stat().st_mode) == 0o600
    assert stat.S_IMODE(secret_path("one").parent.stat().st_mode) == 0o700
    assert local_credentials("one") == credentials
    newer = ClusterCredentials.make(cluster="one")
    write_secret(secret_path("one"), newer)
    assert local_credentials("one") == newer


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    private_folder(secret_path("one").parent)
    secret_path("one").symlink_to(victim)
    write_secret(secret_path("one"), ClusterCredentials.make())
    assert victim.read_text() == "as it was" and not secret_path("one").is_symlink()


def test_a_folder_that_others_may_enter_is_closed_to_them() -> None:
    folder = secret_path("one").parent
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    write_secret(secret_path("one"), ClusterCredentials.make())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 65533, 65533)
    with pytest.raises(ResourceError, match="belongs to another user"):
        write_secret(folder / "one.secret", ClusterCredentials.make())


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        ("", 0o600, "holds no cluster secret"),
        ("too short", 0o600, "holds no cluster secret"),
        ("k" * 43 + "\nand more", 0o600, "holds no cluster secret"),
        ("k" * 5000, 0o600, "holds no cluster secret"),
        ("ü" * 43, 0o600, "holds no cluster secret"),
        ("two.parts", 0o600, "holds no cluster secret .*, and no token"),
        (f"a.b.{'c' * 2048}", 0o600, "holds no cluster secret"),
        ("k" * 43, 0o644, "everybody may read this secret; .* chmod 600"),
    ],
)
def test_a_file_that_is_no_secret_is_named_and_not_shown(tmp_path: Path, content, mode, complaint) -> None:
    file = tmp_path / "cluster.secret"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=f"{file}: {complaint}") as caught:
        read_secret(file)
    assert not content or content not in str(caught.value)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="is no file"):
        read_secret(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_secret(tmp_path)
    with pytest.raises(ConfigError, match=r"second\.secret: the cluster secret cannot be read \(No such file"):
        local_credentials("second")


def test_commands_find_it_through_what_up_noted_and_down_removes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = ClusterCredentials.make(cluster="one")
    up = UpCluster(
        name="one", ray_address="127.0.0.1:1", model="/m", router_addresses=("127.0.0.1:2",),
        controller_address="127.0.0.1:3", secret_file=str(secret_path("one")), local_ray=None,
    )  # fmt: skip
    cluster_file.save(up)
    write_secret(secret_path("one"), credentials)
    noted = cluster_file.load("one")
    assert noted is not None and launch.credentials_of(noted) == credentials
    assert credentials.secret not in (secret_path("one").parent / "one.json").read_text()

    class Joined:
        def credentials(self) -> ClusterCredentials:
            return credentials

    secret_path("one").unlink()  # e.g. on another host: then Ray is asked, and the answer cached
    monkeypatch.setattr(launch, "join", lambda *_: Joined())
    monkeypatch.setattr(launch, "leave", lambda: None)
    assert launch.credentials_of(noted) == credentials == local_credentials("one")
    cluster_file.forget("one")
    assert not secret_path("one").exists()


def test_reading_it_imports_little() -> None:
    """Because every command reads it at its start."""
    code = "import sys, moecluster.rpc.credentials; print(sorted({'torch', 'grpc', 'ray', 'jwt'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

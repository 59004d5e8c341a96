"""A start takes the secret that it is given, so that those who have it can use the cluster that comes up."""

from pathlib import Path
from typing import Any

import pytest

from actors import launch
from moecluster.config import read_config
from moecluster.errors import ConfigError
from moecluster.rpc.credentials import SECRET_FILE_VARIABLE, ClusterCredentials, read_secret, write_secret


class RecordingCluster:
    """Stands in for a cluster, and records the credentials that it is started with."""

    def __init__(self) -> None:
        self.credentials: ClusterCredentials | None = None

    def start(self, *arguments: Any, credentials: ClusterCredentials) -> None:
        self.credentials = credentials

    def router_addresses(self) -> tuple[str, ...]:
        return ("127.0.0.1:2",)

    def controller_address(self) -> str:
        return "127.0.0.1:3"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RecordingCluster:
    recording = RecordingCluster()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(launch, "join", lambda name, address, local: recording)
    monkeypatch.setattr(launch, "leave", lambda: None)
    monkeypatch.setattr(launch, "_refuse_wrong_model", lambda model_dir: None)
    return recording


def bring_up() -> str:
    config = read_config({"cluster": {"name": "one", "address": "127.0.0.1:1"}})
    return launch.bring_up(config, "/models/tiny").secret_file


def test_a_given_secret_is_taken(cluster: RecordingCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = ClusterCredentials.make()
    write_secret(tmp_path / "given" / "secret", given)
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / "given" / "secret"))
    assert read_secret(bring_up()).secret == given.secret
    assert cluster.credentials is not None and cluster.credentials.secret == given.secret


def test_a_token_starts_no_cluster(cluster: RecordingCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_secret(tmp_path / "given" / "token", ClusterCredentials(token="a.b.c"))
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / "given" / "token"))
    with pytest.raises(ConfigError, match="holds a token, and a cluster starts with a secret"):
        bring_up()


def test_else_a_new_one_is_made(cluster: RecordingCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_FILE_VARIABLE, raising=False)
    secret = read_secret(bring_up()).secret
    assert cluster.credentials is not None and cluster.credentials.secret == secret

"""The application for RayService users, in a real Ray Serve: completions, a stream, and a refusal without a key."""

import json
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve

from actors.driver import Cluster
from actors.names import CONTROLLER
from actors.serve_app import Arguments, ServedCluster, build
from moecluster.config import load_config, read_config
from moecluster.errors import CheckpointError, ConfigError, ResourceError
from tests.support.clusters.ray_cluster import wait_for_result

KEY = "a-key-of-the-test"
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "def add(a, b):", "max_tokens": 20, "temperature": 0}

pytestmark = pytest.mark.timeout(400)


class ServedApp:
    """The running application."""

    def __init__(self, url: str, arguments: Arguments, cluster: Cluster) -> None:
        self.url = url
        self.arguments = arguments
        self.cluster = cluster

    def openai(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=120.0, max_retries=0)


@pytest.fixture(scope="module")
def app(ray_session: object, directory: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApp]:
    folder = tmp_path_factory.mktemp("serve")
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(KEY)
    name = f"test-{uuid.uuid4().hex[:8]}"
    settings: dict[str, dict[str, object]] = {
        "cluster": {"name": name, "num_expert_actors": 2},
        "model": {"path": directory},
        "serve": {"model_name": "tiny"},
        "security": {"api_keys_file": str(keys)},
    }
    arguments = Arguments(target=str(_toml(folder / "settings.toml", settings)))
    port = _free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    cluster = Cluster(name)
    try:
        serve.run(build(arguments), name="app")
        yield ServedApp(f"http://127.0.0.1:{port}", arguments, cluster)
    finally:
        serve.shutdown()
        cluster.stop()


def _toml(path: Path, settings: dict[str, dict[str, object]]) -> Path:
    lines = [
        line
        for section, table in settings.items()
        for line in (f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()))
    ]
    path.write_text("\n".join(lines))
    return path


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_completions_and_streams_pass_through_serve(app: ServedApp) -> None:
    wait_for_result(lambda: httpx.get(f"{app.url}/health", timeout=5.0).json()["status"] == "ready", "it is ready")
    with app.openai() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.completions.create(**TEXT).choices[0].text
        chunks = [chunk.choices[0].text for chunk in client.completions.create(**TEXT, stream=True)]
    assert len(whole) > 1
    assert len(chunks) > 2 and "".join(chunks) == whole


def test_a_request_without_a_key_or_with_a_wrong_one_is_refused(app: ServedApp) -> None:
    assert httpx.post(f"{app.url}/v1/completions", json=TEXT, timeout=30.0).status_code == 401
    with app.openai("a-wrong-key") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_running_cluster_is_taken_over_with_its_own_settings_only(app: ServedApp) -> None:
    tables = load_config(app.arguments.target).to_tables()
    ServedCluster(tables, app.arguments.target, random_weights=False)
    tables["serve"]["max_waiting"] = 1
    with pytest.raises(ResourceError, match=r"up with other settings \(serve\.max_waiting\)"):
        ServedCluster(tables, app.arguments.target, random_weights=False)


def test_weights_are_not_made_up(app: ServedApp, tmp_path: Path) -> None:
    tables = read_config({"cluster": {"name": "none"}, "train": {"output_dir": str(tmp_path)}}).to_tables()
    with pytest.raises(CheckpointError, match=r"demo has no weights: set model.path, or"):
        ServedCluster(tables, "demo", random_weights=False)
    tables["model"]["path"] = str(tmp_path)
    with pytest.raises(ConfigError, match=f"random_weights: {tmp_path} has weights"):
        ServedCluster(tables, "demo", random_weights=True)


def test_the_cluster_survives_its_replica_and_is_brought_up_again_if_it_is_lost(app: ServedApp) -> None:
    pids = _pids(app.cluster)
    (lost,) = _replicas("cluster")
    ray.kill(ray.get_actor(lost, namespace="serve"))
    wait_for_result(lambda: _is_running("cluster") and _replicas("cluster") - {lost}, "Serve has a new replica")
    assert _pids(app.cluster) == pids
    app.cluster.stop()
    with app.openai() as client:
        again = wait_for_result(lambda: _completed(client), "the cluster serves again", 120.0)
    assert again and _pids(app.cluster)[CONTROLLER] != pids[CONTROLLER]


def _pids(cluster: Cluster) -> dict[str, int]:
    return {name: found.pid for name, found in cluster.endpoints().items() if found is not None}


def _completed(client: openai.OpenAI) -> str:
    try:
        return str(client.completions.create(**TEXT).choices[0].text)
    except openai.APIStatusError:
        return ""


def _is_running(deployment: str) -> bool:
    return bool(serve.status().applications["app"].deployments[deployment].status == "HEALTHY")


def _replicas(deployment: str) -> set[str]:
    """Names of the actors that are replicas of a deployment."""
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if f"#{deployment}#" in name}


def test_a_typo_in_the_arguments_and_a_setting_that_is_none_are_refused() -> None:
    with pytest.raises(ValueError, match="tragte"):
        Arguments(tragte="demo")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"serve\.hots"):
        build(Arguments(target="demo", settings={"serve.hots": "x"}))

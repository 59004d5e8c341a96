"""`moecluster serve` with its own Ray: HTTP requests, a second gateway, a killed router, and the shutdown."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.cluster.test_cli import COMMAND, ROOT
from tests.conftest import processes_of_this_session
from tests.support.clusters.local_rays import local_rays
from tests.support.clusters.ray_cluster import wait_for_result
from tests.support.soak.generation_load import save_decided_model

UP_TIMEOUT_S = 180.0
MAX_GATEWAY_BYTES = 200 * 2**20  # torch alone would take more

pytestmark = pytest.mark.timeout(400)


class Served:
    """A command that serves HTTP until interrupted."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments, "--port", "0"], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        self.output: list[str] = []

    def wait_started(self) -> str:
        """Waits until it serves; returns its address."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("serving "):
                return line.split(" at ")[1].split("/v1")[0]
        raise AssertionError(f"it ended: {self.output}")

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60.0)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "COLUMNS": "200"}


@pytest.fixture
def served(environment: dict[str, str], tmp_path: Path) -> Iterator[Served]:
    model = save_decided_model(tmp_path / "tiny")
    serving = Served(environment, "serve", model, "--set", "cluster.num_expert_actors=2")
    yield serving
    serving.process.terminate()
    serving.process.wait(60.0)
    assert local_rays() == set()


def test_a_model_is_served_as_long_as_the_command_runs(
    served: Served, environment: dict[str, str], tmp_path: Path
) -> None:
    url = served.wait_started()
    text: dict[str, Any] = {"model": "tiny", "prompt": "def add(a, b):", "max_tokens": 20, "temperature": 0}
    wait_for_result(lambda: _is_well(url), "the gateway answers")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120.0, max_retries=0) as client:
        reference = client.completions.create(**text).choices[0].text
        assert psutil.Process(served.process.pid).memory_info().rss < MAX_GATEWAY_BYTES
        second = Served(environment, "gateway", "--model", "other=moecluster")
        try:
            told = httpx.post(f"{second.wait_started()}/v1/completions", json={**text, "model": "other"}, timeout=60.0)
            assert told.json()["choices"][0]["text"] == reference
            _run_examples(url, environment, tmp_path)
        finally:
            assert second.interrupt() == 0
        os.kill(_router_pid(), signal.SIGKILL)
        # Ray restarts it at another address, which the gateway asks Ray for.
        assert client.completions.create(**text).choices[0].text == reference
    assert len(local_rays()) == 1
    assert served.interrupt() == 0
    assert local_rays() == set()


def _run_examples(url: str, environment: dict[str, str], tmp_path: Path) -> None:
    """The examples that need a gateway, as programs of their own."""
    openai_client = [sys.executable, "examples/openai_client.py", "import os", "--base-url", f"{url}/v1"]
    shown = subprocess.run(
        [*openai_client, "--max-tokens", "8"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120.0
    )
    assert shown.returncode == 0 and "tiny: 8 tokens after" in shown.stdout, shown.stdout + shown.stderr
    requests = [json.loads(line) for line in (ROOT / "examples" / "requests.jsonl").read_text().splitlines()]
    for request in requests:
        request["body"]["model"] = "tiny"  # the example is written for the demo's model
    source, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(f"{json.dumps(request)}\n" for request in requests))
    batch = [*COMMAND, "batch", str(source), str(answers), "--base-url", url]
    subprocess.run(batch, env=environment, cwd=ROOT, check=True, timeout=120.0)
    answered = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["custom_id"] for line in answered] == [request["custom_id"] for request in requests]
    assert [len(line["response"]["body"]["choices"]) for line in answered] == [1, 1, 2]


def _is_well(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False


def _router_pid() -> int:
    (pid,) = [p.pid for p, line in processes_of_this_session().items() if "ray::RouterActor" in line]
    return pid

"""moecluster batch against a real server that refuses, breaks off and goes away; also killed during a run."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors import cluster_file
from actors.cluster_file import UpCluster
from moecluster.client import Client
from moecluster.errors import ConfigError, Unavailable
from moecluster.http_client.batch.journal import Journal, journal_path
from moecluster.http_client.batch.lines import BatchInput
from moecluster.http_client.batch.run import run_batch
from moecluster.http_client.batch.send import Retries
from moecluster.http_client.connection import open_gateway
from tests.support.batch_requests import check_whole, text_of, write_requests
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.fakes.fake_openai import FakeOpenAI, Trouble, answer_to, serving
from tests.support.waiting import WAIT_S, wait_until

COMMAND = (sys.executable, "-c", "from moecluster.cli.app import main; main()", "batch")

Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Sends prompts in this process, and returns the output's lines."""

    def run(
        stand_in: FakeOpenAI,
        prompts: Sequence[str],
        *,
        concurrency: int = 4,
        attempts: int = 3,
        patience_s: float = 10.0,
        timeout_s: float = 20.0,
        key: str = "",
    ) -> list[dict[str, Any]]:
        out = tmp_path / "out.jsonl"

        async def send(batch: BatchInput, journal: Journal) -> None:
            async with open_gateway(
                stand_in.url, api_key=key, max_connections=concurrency, timeout_s=timeout_s
            ) as gateway:
                retries = Retries(attempts=attempts, patience_s=patience_s)
                await run_batch(
                    batch, journal, gateway, concurrency=concurrency, retries=retries, on_done=lambda output: None
                )

        with BatchInput(write_requests(tmp_path / "in.jsonl", prompts)) as batch, Journal(out, batch) as journal:
            asyncio.run(send(batch, journal))
            journal.finish()
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def test_every_request_gets_its_answer_with_so_many_at_once(ask, tmp_path) -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    with serving(FakeOpenAI(delay_s=0.02)) as stand_in:
        outputs = ask(stand_in, prompts, concurrency=5)
    check_whole(tmp_path / "out.jsonl", prompts)
    assert stand_in.most_running == 5 and set(stand_in.counts().values()) == {1}
    first = outputs[0]
    assert set(first) == {"id", "custom_id", "response", "error"} and first["error"] is None
    assert first["response"]["status_code"] == 200 and first["response"]["request_id"] == "request-prompt 0"


def test_a_refused_request_waits_as_long_as_it_is_told_and_is_tried_beyond_its_attempts(ask, tmp_path) -> None:
    told = [Trouble(status=429, retry_after="1"), Trouble(status=503, retry_after="1")]
    with serving(FakeOpenAI(troubles={"slow": told})) as stand_in:
        ask(stand_in, ["slow", "quick"], attempts=1)
    check_whole(tmp_path / "out.jsonl", ["slow", "quick"])
    first_s, second_s, third_s = stand_in.times("slow")
    assert second_s - first_s >= 0.9 and third_s - second_s >= 0.9


def test_patience_is_finite_and_what_was_done_is_kept(ask, tmp_path) -> None:
    endless = {"refused": [Trouble(status=429)] * 100}
    prompts = [*(f"prompt {i}" for i in range(10)), "refused"]
    with serving(FakeOpenAI(troubles=endless)) as stand_in:
        with pytest.raises(Unavailable, match=r"takes no requests for 2 s now \(429: trouble 429\)"):
            ask(stand_in, prompts, patience_s=2.0)
        assert not (tmp_path / "out.jsonl").exists()
        with pytest.raises(Unavailable):  # Retry-After exceeds its patience
            stand_in.troubles = {"refused": [Trouble(status=429, retry_after="3600")] * 100}
            ask(stand_in, prompts, patience_s=100.0)
        stand_in.troubles = {}
        ask(stand_in, prompts)
    check_whole(tmp_path / "out.jsonl", prompts)
    counts = stand_in.counts()
    assert counts.pop("refused") >= 4 and set(counts.values()) == {1}  # requests in the journal were not repeated


def test_a_broken_request_is_tried_so_often_and_then_is_a_line_of_its_own(ask) -> None:
    troubles = {
        "drops once": [Trouble(drops=True)],
        "drops": [Trouble(drops=True)] * 3,
        "fails once": [Trouble(status=500)],
        "fails": [Trouble(status=502)] * 3,
        "hangs": [Trouble(hangs=True)] * 3,
        "wrong": [Trouble(status=400)],
    }
    with serving(FakeOpenAI(troubles=troubles)) as stand_in:
        outputs = ask(stand_in, list(troubles), timeout_s=0.5, concurrency=6)
    found = {output["custom_id"].removeprefix("id of "): output for output in outputs}
    assert stand_in.counts() == {"drops once": 2, "drops": 3, "fails once": 2, "fails": 3, "hangs": 3, "wrong": 1}
    for prompt in ("drops once", "fails once"):
        assert text_of(found[prompt]) == answer_to(prompt)
    assert found["fails"]["response"]["status_code"] == 502 and found["fails"]["error"] is None
    assert found["wrong"]["response"]["body"]["error"]["message"] == "trouble 400"
    for prompt, code in (("drops", "connection_error"), ("hangs", "timeout")):
        assert found[prompt]["response"] is None and found[prompt]["error"]["code"] == code
        assert found[prompt]["error"]["message"].startswith("3 times: ")


def test_a_wrong_key_ends_the_run_at_once_and_no_line_is_spent_on_it(ask, tmp_path) -> None:
    with serving(FakeOpenAI(key="sk-right")) as stand_in:
        with pytest.raises(ConfigError, match="refuses the API key") as caught:
            ask(stand_in, ["a", "b"], key="sk-wrong")
        assert "sk-wrong" not in str(caught.value)
        ask(stand_in, ["a", "b"], key="sk-right")
    check_whole(tmp_path / "out.jsonl", ["a", "b"])


def test_a_gateway_that_is_away_is_waited_for(ask, tmp_path) -> None:
    with serving(FakeOpenAI()) as gone:
        port = httpx.URL(gone.url).port or 0
    prompts, back = ["a", "b", "c"], FakeOpenAI(url=gone.url)
    asking = threading.Thread(target=ask, args=(gone, prompts), kwargs={"patience_s": 30.0})
    asking.start()
    time.sleep(1.0)
    with serving(back, port=port):
        asking.join(WAIT_S)
        assert not asking.is_alive()
    check_whole(tmp_path / "out.jsonl", prompts)


def command(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The command without a terminal, as a Ray job runs it."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def said(process: subprocess.Popen[str], code: int) -> str:
    shown, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == code, shown
    assert "Traceback" not in shown and "\x1b" not in shown, shown
    return " ".join(shown.split())


def wait_for_lines(path: Path, number: int) -> None:
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= number, f"{number} lines in {path}")


def test_a_gateway_that_is_away_is_told_at_once_and_waited_for(tmp_path) -> None:
    """Reads the pipe while the command waits: the message appears before patience ends."""
    with serving(FakeOpenAI()) as gone:
        port = httpx.URL(gone.url).port or 0
    source, out = write_requests(tmp_path / "in.jsonl", ["a", "b", "c"]), tmp_path / "out.jsonl"
    process = command(source, out, "--base-url", gone.url, "--patience-s", 500)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith(f"the gateway at {gone.url} takes no requests (cannot connect: "), first
    assert first.endswith("waiting for it, up to 500 s; Ctrl-C ends it\n")
    with serving(FakeOpenAI(url=gone.url), port=port):
        shown = said(process, 0)
    check_whole(out, ["a", "b", "c"])
    assert "takes no requests" not in shown  # once for all three


def test_a_host_that_says_nothing_at_all_is_told_at_once(tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = command(write_requests(tmp_path / "in.jsonl", ["a"]), tmp_path / "out.jsonl", "--base-url", url)
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert "0 of 1 lines are kept" in said(process, 130)
    assert first.startswith(f"the gateway at {url} takes no requests (no answer yet)"), first


def test_killed_amid_a_run_again_and_again_every_line_comes_once(tmp_path) -> None:
    prompts = [f"prompt {i}" for i in range(150)]
    source, out = write_requests(tmp_path / "in.jsonl", prompts), tmp_path / "out.jsonl"
    with serving(FakeOpenAI(delay_s=0.05, key="sk-right")) as stand_in:
        arguments = (source, out, "--base-url", f"{stand_in.url}/v1", "--concurrency", 8, "--api-key-env", "A_KEY")
        kept = 0
        for signal_number, kill_after in ((signal.SIGKILL, 30), (signal.SIGKILL, 60), (signal.SIGTERM, 90)):
            process = command(*arguments, A_KEY="sk-right")
            wait_for_lines(journal_path(out), 1 + kill_after)
            process.send_signal(signal_number)
            shown = said(process, 128 + signal_number if signal_number == signal.SIGTERM else -signal_number)
            noted = journal_path(out).read_bytes().count(b"\n") - 1
            assert not out.exists() and kill_after <= noted < len(prompts)
            assert (f"going on: {kept} of 150 lines are done" in shown) is (kept > 0)
            kept = noted
        assert f"{kept} of 150 lines are kept" in shown
        shown = said(command(*arguments, A_KEY="sk-right"), 0)
        assert f"going on: {kept} of 150 lines are done" in shown and f"written to {out}" in shown
        check_whole(out, prompts)
        assert sum(stand_in.counts().values()) <= 150 + 3 * 8  # only requests in flight at a kill were repeated
        shown = said(command(*arguments, A_KEY="sk-right"), 0)
        assert "holds all 150 answers already" in shown
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path) -> None:
    source = write_requests(tmp_path / "in.jsonl", ["a"])
    with serving(FakeOpenAI(key="sk-right")) as stand_in:
        shown = said(command(source, tmp_path / "out.jsonl", "--base-url", stand_in.url, MOECLUSTER_API_KEY="no"), 2)
        assert "refuses the API key (401: no such key)" in shown and "0 of 1 lines are kept" in shown
    (tmp_path / "torn.jsonl").write_text("{\n")
    assert "line 1: no JSON" in said(command(tmp_path / "torn.jsonl", tmp_path / "x.jsonl"), 2)
    (tmp_path / "other.jsonl").write_text("mine\n")
    assert "is there already, and not the answers" in said(command(source, tmp_path / "other.jsonl"), 2)
    assert (tmp_path / "other.jsonl").read_text() == "mine\n"
    assert "OUT: got" in said(command(source, tmp_path / "nowhere" / "x.jsonl"), 2)


def test_straight_to_a_cluster_through_a_gateway_of_its_own(tmp_path, monkeypatch) -> None:
    model = tmp_path / "tiny"
    save_tiny_model(model)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    requests = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": {"model": name, "prompt": prompt}}
        for i, (name, prompt) in enumerate((name, prompt) for name in ("tiny", "mine") for prompt in ("def", "class"))
    ]
    for request in requests:
        request["body"] |= {"max_tokens": 8, "temperature": 0}  # type: ignore[operator]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    with LoopbackCluster(str(model)) as cluster:
        cluster_file.save(
            UpCluster(
                name="mine",
                ray_address="",
                model=str(model),
                router_addresses=(cluster.router_server.address,),
                controller_address=cluster.controller_server.address,
                local_ray=None,
            )
        )
        # concurrency as the present router's bound
        said(command(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--cluster", "mine", "--concurrency", 2), 0)
        with Client(cluster.router_server.address) as client:
            expected = {prompt: client.generate(prompt, max_new_tokens=8).text() for prompt in ("def", "class")}
    outputs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [text_of(output) for output in outputs] == [expected["def"], expected["class"]] * 2
    missing = said(command(tmp_path / "in.jsonl", tmp_path / "other.jsonl", "--cluster", "nobody"), 3)
    assert "no cluster nobody is up" in missing

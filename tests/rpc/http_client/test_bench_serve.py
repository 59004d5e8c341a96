"""moecluster bench serve against a real server with known delays."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.clusters.running_gateway import running_gateway
from tests.support.fakes.fake_openai import FakeOpenAI, Trouble, serving
from tests.support.waiting import WAIT_S, wait_until

COMMAND = (sys.executable, "-c", "from moecluster.cli.app import main; main()", "bench", "serve")


def bench(*arguments: object, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, "COLUMNS": "160", **environment},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_clients_that_wait_see_the_servers_delays(tmp_path) -> None:
    with serving(FakeOpenAI(delay_s=0.15, token_s=0.03)) as stand_in:
        shown = bench(
            *("--base-url", stand_in.url, "--concurrency", 3, "--num-prompts", 9, "--output-tokens", "4-6"),
            *("--input-tokens", "3-5", "--slo-ttft-ms", 5000, "--slo-itl-ms", 1, "--json", tmp_path / "load.json"),
            *("--plot", tmp_path / "load.png"),
        )
    report = load(tmp_path / "load.json")
    summary, requests = report["summary"], report["requests"]
    assert (summary["requests"], summary["completed"], summary["errors"]) == (9, 9, {})
    assert summary["time_to_first_token_s"]["p50"] >= 0.15 and summary["inter_token_s"]["p50"] >= 0.03
    assert summary["output_tokens"] == sum(r["output_tokens"] for r in requests) and summary["good"] == 0
    assert all(4 <= r["output_tokens"] == len(r["chunks_s"]) <= 6 and 3 <= r["prompt_tokens"] <= 5 for r in requests)
    assert summary["duration_s"] >= 3 * (0.15 + 3 * 0.03)  # three rounds of three concurrent requests
    assert report["load"]["model"] == "stand-in" and report["load"]["concurrency"] == 3
    body = stand_in.bodies[-1]
    assert body["model"] == "stand-in" and body["ignore_eos"] is True and body["temperature"] == 0.0
    assert len(stand_in.seen) == 10  # including one warm-up request
    assert "goodput (first token 5000 ms, mean token 1 ms)" in shown and "0.00 a second (0.0 %)" in shown
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_requests_that_come_at_a_rate_do_not_wait_for_each_other_and_their_delay_counts(tmp_path) -> None:
    """With one connection for all, requests that wait for it are measured from when they were due."""
    arguments = ("--request-rate", 20, "--num-prompts", 10, "--output-tokens", 1, "--json", tmp_path / "load.json")
    with serving(FakeOpenAI(delay_s=0.2)) as stand_in:
        bench("--base-url", stand_in.url, *arguments)
        free = load(tmp_path / "load.json")["summary"]
        bench("--base-url", stand_in.url, *arguments, "--max-in-flight", 1)
        queued = load(tmp_path / "load.json")["summary"]
    assert free["completed"] == queued["completed"] == 10
    assert queued["duration_s"] >= 10 * 0.2 > free["duration_s"]
    assert queued["time_to_first_token_s"]["max"] > 1.0 > free["time_to_first_token_s"]["p50"]


def test_errors_are_counted_by_kind_and_explained(tmp_path) -> None:
    prompts = [f"word{i}" for i in range(40)]
    (tmp_path / "text.txt").write_text(" ".join(prompts))
    troubles = {
        prompt: [trouble]
        for prompt, trouble in zip(
            prompts,
            4 * [Trouble(status=429), Trouble(drops=True), Trouble(error_event=True), Trouble(hangs=True)],
            strict=False,
        )
    }
    with serving(FakeOpenAI(troubles=troubles)) as stand_in:
        shown = bench(
            *("--base-url", stand_in.url, "--concurrency", 8, "--num-prompts", 80, "--output-tokens", 3),
            *("--input-tokens", 1, "--text", tmp_path / "text.txt", "--timeout-s", 2, "--warmup", 0),
            *("--json", tmp_path / "load.json"),
        )
    summary = load(tmp_path / "load.json")["summary"]
    kinds = {"status 429", "connection lost", "error in the stream", "timeout"}
    assert set(summary["errors"]) == kinds and summary["completed"] == 80 - sum(summary["errors"].values()) > 40
    assert "status 429: trouble 429" in shown and "error in the stream: trouble amid the stream" in shown
    assert all(f"failed: {kind}" in shown for kind in kinds)


def test_a_load_ends_with_its_time(tmp_path) -> None:
    with serving(FakeOpenAI(delay_s=0.05)) as stand_in:
        for kind in (("--request-rate", 30), ("--concurrency", 2)):
            bench("--base-url", stand_in.url, *kind, "--duration-s", 1, "--json", tmp_path / "load.json")
            requests = load(tmp_path / "load.json")["requests"]
            assert len(requests) >= 4 and all(r["scheduled_s"] <= 1.0 for r in requests)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
@pytest.mark.parametrize("load_kind", ["--concurrency", "--request-rate"])
def test_what_was_measured_before_an_interruption_is_told(tmp_path, load_kind, number, code) -> None:
    with serving(FakeOpenAI(delay_s=0.05)) as stand_in:
        process = subprocess.Popen(
            [
                *(*COMMAND, "--base-url", stand_in.url, load_kind, "20", "--duration-s", "600", "--output-tokens", "2"),
                *("--json", str(tmp_path / "load.json"), "--plot", str(tmp_path / "load.png"), "--warmup", "0"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # At most 20 to 40 of them are under way.
        wait_until(lambda: len(stand_in.seen) >= 60 or process.poll() is not None, "the 60th request")
        assert process.poll() is None
        process.send_signal(number)
        shown, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == code and "Traceback" not in shown, shown
    report = load(tmp_path / "load.json")
    assert report["interrupted"] is True and report["summary"]["completed"] > 0
    assert report["summary"]["requests"] == len(report["requests"]) < len(stand_in.seen)
    assert "ended early" in shown and "time to first token" in shown
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_an_interruption_before_any_answer_says_that_nothing_was_measured() -> None:
    with serving(FakeOpenAI(delay_s=600.0)) as stand_in:
        process = subprocess.Popen(
            [*COMMAND, "--base-url", stand_in.url, "--warmup", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wait_until(lambda: stand_in.seen or process.poll() is not None, "the first request")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130 and "nothing was measured" in shown and "Traceback" not in shown, shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--request-rate", 1, "--concurrency", 1), "--request-rate, --concurrency: give one of them"),
        (("--num-prompts", 1, "--duration-s", 1), "--num-prompts, --duration-s: give one of them"),
        (("--request-rate", 0), "--request-rate: got 0, expected more than 0"),
        (("--input-tokens", "9-3"), '--input-tokens: got "9-3"'),
        (("--base-url", "nowhere"), '--base-url: got "nowhere"'),
        (("--plot", "x.txt"), "--plot: got"),
        (("--text", "nowhere.txt"), "nowhere.txt: cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(arguments: tuple[object, ...], complaint: str) -> None:
    assert complaint in bench(*arguments, code=2)


def test_a_gateway_that_is_not_there_and_a_wrong_key_are_said_at_once() -> None:
    assert "cannot be reached" in bench("--base-url", "http://127.0.0.1:1", code=1)
    with serving(FakeOpenAI(key="sk-right")) as stand_in:
        assert "refuses the API key" in bench("--base-url", stand_in.url, code=2, MOECLUSTER_API_KEY="sk-wrong")
        bench("--base-url", stand_in.url, "--num-prompts", 2, MOECLUSTER_API_KEY="sk-right")


def test_against_the_real_gateway_over_a_real_cluster(tmp_path) -> None:
    model = save_tiny_model(tmp_path)
    with LoopbackCluster(model) as cluster, running_gateway([cluster.router_server.address]) as gateway:
        bench(
            *("--base-url", gateway.url, "--concurrency", 2, "--num-prompts", 6, "--input-tokens", "8-16"),
            *("--output-tokens", 6, "--json", tmp_path / "load.json"),
        )
    summary = load(tmp_path / "load.json")["summary"]
    assert (summary["completed"], summary["errors"]) == (6, {})
    assert 6 * 8 <= summary["prompt_tokens"] <= 6 * 16 and 0 < summary["output_tokens"] <= 36

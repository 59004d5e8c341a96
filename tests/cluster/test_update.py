"""Replaces the weights of a serving cluster by the command line; restarted processes keep the new ones."""

import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from actors import cluster_file
from actors.cluster_file import UpCluster
from moecluster.client import Client
from moecluster.rpc.credentials import secret_path, write_secret
from tests.support.clusters.ray_cluster import CREDENTIALS, RayCluster, wait_for_result
from tests.support.models.weight_versions import NEW_TOKENS, PROMPTS, requests_alone, save_version

COMMAND = [sys.executable, "-c", "from moecluster.cli.app import main; main()"]
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(300)


def write(address: str, prompt: str = PROMPTS[0]) -> list[int]:
    with Client(address, credentials=CREDENTIALS) as client:
        stream = client.generate(prompt, max_new_tokens=NEW_TOKENS)
        stream.text()
        return list(stream.ids)


def test_weights_are_replaced_by_the_command_line(ray_session, tmp_path: Path, monkeypatch) -> None:
    first, second = (save_version(tmp_path / name, seed) for seed, name in enumerate(("first", "second")))
    before, after = (requests_alone(path)[PROMPTS[0]] for path in (first, second))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    tables = {"cluster": {"num_expert_actors": 2}, "controller": {"lease_s": 2.0, "period_s": 0.2}}
    with RayCluster(first, tables) as cluster:
        name = cluster.config.cluster.name
        # As `up` does, on a Ray that this test does not own.
        noted = UpCluster(
            name=name,
            ray_address=ray_session.address,
            model=first,
            router_addresses=(cluster.router_address,),
            controller_address=cluster.driver.controller_address(),
            secret_file=str(secret_path(name)),
            local_ray=None,
        )
        cluster_file.save(noted)
        write_secret(secret_path(name), CREDENTIALS)
        texts: list[list[int]] = []
        failures: list[str] = []
        over = threading.Event()

        def go_on_writing() -> None:
            while not over.is_set():
                try:
                    texts.append(write(cluster.router_address))
                except Exception as exc:
                    failures.append(repr(exc))

        writing = threading.Thread(target=go_on_writing)
        writing.start()
        try:
            wait_for_result(lambda: texts, "a first text")
            done = run("update", second, "--name", name)
            assert done.returncode == 0 and f"version 2: {second}" in done.stdout, done.stderr
            count = len(texts)
            wait_for_result(lambda: len(texts) > count + 1, "texts of the new version")
        finally:
            over.set()
            writing.join()
        assert not failures and {tuple(text) for text in texts} == {tuple(before), tuple(after)}
        assert texts[-1] == after
        assert f"weight version 2: {second}" in run("status", "--name", name).stdout
        # A restarted process starts with the weights served now.
        for actor in ("controller", "router", "expert-0"):
            pid = cluster.kill(actor, signal.SIGKILL)
            wait_for_result(partial(is_started_again, cluster, actor, pid), f"{actor} is started again")
        status = cluster.wait_served()
        assert (status.weight_version, status.checkpoint) == (2, second)
        assert write(cluster.driver.router_address()) == after


def is_started_again(cluster: RayCluster, actor: str, pid: int) -> bool:
    return cluster.pids().get(actor, pid) != pid


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)

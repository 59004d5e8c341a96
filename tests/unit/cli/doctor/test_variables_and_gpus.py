"""doctor: environment variables that spoil a cluster, and what torch says about GPUs."""

import os
from typing import Any

import pytest

from moecluster.cli.commands.doctor import gpu, variables
from moecluster.cli.commands.doctor.finding import Level
from moecluster.config import Config, read_config


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name not in ("PATH", "HOME")]:
        monkeypatch.delenv(name)


def test_a_clean_environment_is_ok() -> None:
    assert variables.variables(Config()).level is Level.OK


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("RAY_ADDRESS", "10.0.0.1:6379", "set cluster.address"),
        ("RAY_AUTH_TOKEN", "secret-of-mine", "unset RAY_AUTH_TOKEN"),
        ("RAY_USE_TLS", "1", "unset RAY_USE_TLS"),
        ("RAY_worker_niceness", "15", "unset RAY_worker_niceness"),
        ("GOMP_CPU_AFFINITY", "0", "unset GOMP_CPU_AFFINITY"),
        ("OMP_PROC_BIND", "close", "unset OMP_PROC_BIND"),
        ("http_proxy", "http://proxy:3128", "set no_proxy=localhost,127.0.0.1"),
        ("PYTHONDONTWRITEBYTECODE", "1", "unset PYTHONDONTWRITEBYTECODE"),
    ],
)
def test_each_is_named_with_what_to_do(name: str, value: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    found = variables.variables(Config())
    assert found.level is Level.WARNING and name in found.found and advice in found.advice
    assert "secret-of-mine" not in found.found + found.advice


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_PROC_BIND", "false"), ("RAY_worker_niceness", "0"), ("RAY_USE_TLS", "0")]
)
def test_harmless_values_are_not_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert variables.variables(Config()).level is Level.OK


def test_a_proxy_that_leaves_this_host_alone_is_ok_and_so_is_a_ray_given_by_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "example.com,localhost")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert variables.variables(read_config({"cluster": {"address": "10.0.0.1:6379"}})).level is Level.OK


def of_torch(**said: Any) -> dict[str, Any]:
    return {"torch": "2.13.0", "build": "CUDA 13.0", "devices": [], "error": ""} | said


DEVICE = {"name": "NVIDIA H200", "free": 140 * 10**9, "total": 150 * 10**9}


@pytest.mark.parametrize(
    ("said", "gpus", "level", "expected"),
    [
        (of_torch(devices=[DEVICE]), 0.0, Level.OK, "NVIDIA H200, 140.0 GB of 150.0 GB free (CUDA 13.0)"),
        (of_torch(devices=[DEVICE]), 1.0, Level.OK, "NVIDIA H200"),
        (of_torch(devices=[DEVICE]), 2.0, Level.PROBLEM, "the actors reserve 2 GPUs"),
        (of_torch(), 0.0, Level.OK, "torch finds no GPU"),
        (of_torch(), 1.0, Level.PROBLEM, "torch finds no GPU"),
        (of_torch(build=None, torch="2.13.0+cpu"), 0.0, Level.WARNING, "torch 2.13.0+cpu is a build for CPUs"),
        (of_torch(build=None), 1.0, Level.PROBLEM, "a build for CPUs"),
        (of_torch(error="driver too old"), 0.0, Level.WARNING, "cannot use the GPU: driver too old"),
        (of_torch(error="driver too old"), 1.0, Level.PROBLEM, "driver too old"),
    ],
)
def test_what_torch_says_is_judged_by_what_the_actors_reserve(
    said: dict[str, Any], gpus: float, level: Level, expected: str
) -> None:
    found = gpu.judge(read_config({"cluster": {"gpus_per_router": gpus}}), said)
    assert found.level is level and expected in found.found, found
    assert bool(found.advice) is (level is not Level.OK)


def test_a_host_without_a_driver_does_not_ask_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DRIVERS", ("/dev/no-such-driver",))
    monkeypatch.setattr(gpu, "SCRIPT", "raise SystemExit(1)")
    assert gpu.gpus(Config()).level is Level.OK
    assert gpu.gpus(read_config({"cluster": {"gpus_per_router": 1.0}})).level is Level.PROBLEM


def test_a_torch_that_crashes_beside_a_driver_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DRIVERS", ("/proc/self",))
    monkeypatch.setattr(gpu, "SCRIPT", "import os; os.abort()")
    assert gpu.gpus(Config()).level is Level.WARNING

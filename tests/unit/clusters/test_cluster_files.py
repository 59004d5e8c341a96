"""The files of `ray up`: valid for Ray, closed to strangers, and with the ports that docs/hosts.md lists."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[3]
FILES = ("onprem", "aws", "gcp")
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "clusters" / f"{name}.yaml").read_text())
    return found


def start_command(config: dict[str, Any], key: str) -> str:
    stop, start = config[key]
    assert stop == "ray stop"
    return str(start)


def options(command: str) -> dict[str, str]:
    """The options of `ray start`."""
    return dict(re.findall(r"--([a-z-]+)=(\"[^\"]*\"|\S+)", command))


@pytest.mark.parametrize("name", FILES)
def test_valid_for_ray(name: str) -> None:
    prepared = prepare_config(read(name))
    validate_config(prepared)
    assert prepared["max_workers"] >= sum(
        node.get("min_workers", 0) for node in prepared["available_node_types"].values()
    )


@pytest.mark.parametrize("name", FILES)
def test_a_misspelt_key_is_seen(name: str) -> None:
    config = read(name)
    config["setup_command"] = config.pop("setup_commands")
    with pytest.raises(Exception, match="setup_command"):
        validate_config(prepare_config(config))


def test_on_ones_own_machines_only_addresses_user_and_key_are_to_be_edited() -> None:
    config = read("onprem")
    assert config["provider"].keys() == {"type", "head_ip", "worker_ips"}
    assert config["auth"].keys() == {"ssh_user", "ssh_private_key"}
    rest = yaml.safe_dump({key: value for key, value in config.items() if key not in ("provider", "auth")})
    for value in (config["provider"]["head_ip"], *config["provider"]["worker_ips"], *config["auth"].values()):
        assert value not in rest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("key", STARTS)
def test_nobody_without_the_token_comes_in(name: str, key: str) -> None:
    config = read(name)
    command = start_command(config, key)
    assert "export RAY_AUTH_MODE=token" in command
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "0.0.0.0" not in command
    if key.startswith("head"):
        assert options(command)["dashboard-host"] == "127.0.0.1"


@pytest.mark.parametrize("name", FILES)
def test_every_node_installs_the_same_and_has_fixed_ports(name: str) -> None:
    config = read(name)
    assert config["setup_commands"] == ["bash ~/moecluster/dist/node_setup.sh"]
    assert config["file_mounts"]["~/moecluster/dist"] == "dist"
    head, worker = (options(start_command(config, key)) for key in STARTS)
    ports = {option: value for option, value in head.items() if option.endswith("port")}
    assert len(set(ports.values())) == len(ports), "two servers on one port"
    assert {option: value for option, value in worker.items() if option.endswith("port")}.items() <= ports.items()
    assert "node-ip-address" in head and "node-ip-address" in worker
    page = (ROOT / "docs" / "hosts.md").read_text()
    missing = [f"--{option}={port}" for option, port in ports.items() if not re.search(rf"\b{port}\b", page)]
    assert not missing, f"docs/hosts.md does not list {missing}"


@pytest.mark.parametrize("name", ("aws", "gcp"))
def test_clouds_start_gpu_workers_on_spot_and_say_that_nobody_has_tried(name: str) -> None:
    config = read(name)
    workers = {key: node for key, node in config["available_node_types"].items() if key != config["head_node_type"]}
    assert workers and config["max_workers"] > sum(node["min_workers"] for node in workers.values())
    assert all("spot" in str(node["node_config"]).lower() for node in workers.values())
    assert "CHECKED ONLY AGAINST RAY'S SCHEMA" in (ROOT / "clusters" / f"{name}.yaml").read_text()


def test_the_setup_script_says_what_a_node_lacks(tmp_path: Path) -> None:
    script = ROOT / "clusters" / "node_setup.sh"
    done = subprocess.run(
        ["bash", str(script)], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "lacks a wheel or constraints.txt; make dist writes both" in done.stderr, done.stderr


def test_a_failed_start_on_a_worker_is_tried_again(tmp_path: Path) -> None:
    """Ray's autoscaler tries no worker again whose commands have failed; a node that is missing it starts again."""
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\nexit 1\n")
    ray.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SSH_CONNECTION": "192.0.2.1 1 192.0.2.11 22"}

    def run(key: str) -> "subprocess.CompletedProcess[str]":
        command = start_command(read("onprem"), key)
        return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)

    assert run("worker_start_ray_commands").returncode == 0
    assert "Ray did not start on" in run("worker_start_ray_commands").stdout
    assert run("head_start_ray_commands").returncode != 0, "ray up says so"

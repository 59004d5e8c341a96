"""doctor: CPUs, memory, /dev/shm, clock and the way between processes of one host."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from moecluster.cli.commands.doctor import machine, same_host
from moecluster.cli.commands.doctor.finding import Level
from moecluster.config import Config, read_config
from tests.support.in_child import finding_of, mounted
from tests.unit.cli.doctor.test_limits import limited


def test_more_cpus_reserved_than_there_are_is_a_problem_of_a_local_ray() -> None:
    many = {"num_expert_actors": 100_000}
    found = machine.cpus(read_config({"cluster": many}))
    assert found.level is Level.PROBLEM and "the actors reserve 25000.5" in found.found
    assert machine.cpus(read_config({"cluster": many | {"address": "10.0.0.1:6379"}})).level is Level.OK


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU")
def test_fewer_cpus_than_ray_counts_is_a_warning() -> None:
    one = sorted(os.sched_getaffinity(0))[0]
    found = finding_of("machine", "cpus", before=f"import os; os.sched_setaffinity(0, {{{one}}})")
    assert found["level"] == "warning" and found["found"].startswith("1 CPUs may be used, and Ray counts")


def test_too_little_memory_for_actors_weights_or_segments_is_told(tmp_path: Path) -> None:
    assert machine.memory(read_config({"cluster": {"num_expert_actors": 10**6}})).level is Level.PROBLEM
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(2**43)  # takes no space
    found = machine.memory(read_config({"model": {"path": str(tmp_path)}}))
    assert found.level is Level.PROBLEM and "weights of 8.8 TB" in found.found
    segments = {"shared_memory_bytes": 2**50}
    found = machine.memory(read_config({"router": segments}))
    assert found.level is Level.WARNING and "router.shared_memory_bytes" in found.advice
    assert machine.memory(read_config({"router": segments | {"transport": "inline"}})).level is Level.OK


def test_a_full_shared_memory_is_a_warning_and_none_a_problem(tmp_path: Path) -> None:
    assert machine.shared_memory(Config()).level is Level.OK
    small = finding_of("machine", "shared_memory", prefix=mounted("size=1m", "/dev/shm"))
    assert small["level"] == "warning" and "Ray wants 134.2 MB" in small["found"] and "--shm-size" in small["advice"]
    address = "cluster.address=10.0.0.1:6379"
    assert finding_of("machine", "shared_memory", address, prefix=mounted("size=1m", "/dev/shm"))["level"] == "ok"
    none = finding_of("machine", "shared_memory", prefix=mounted("size=1m", "/dev"))
    assert none["level"] == "problem" and "No such file" in none["found"] and "mount" in none["advice"]


def test_the_clock_is_judged_by_whether_several_hosts_need_it() -> None:
    synchronized = machine.is_synchronized()
    alone, several = machine.clock(Config()), machine.clock(read_config({"cluster": {"address": "10.0.0.1:6379"}}))
    assert alone.level is Level.OK
    assert several.level is (Level.WARNING if synchronized is False else Level.OK)
    assert "unknown" in alone.found if synchronized is None else "synchronized" in alone.found


CHECKS = (same_host.sealed_memory, same_host.packet_pipes, same_host.peers)


@pytest.mark.parametrize("check", CHECKS)
def test_processes_of_this_host_reach_each_other(check: Callable[[Config], object]) -> None:
    assert getattr(check(Config()), "level", None) is Level.OK, check(Config())


@pytest.mark.parametrize(
    ("check", "before", "expected"),
    [
        ("sealed_memory", "", "File too large"),
        ("packet_pipes", "import os; [os.dup(0) for _ in range(200 - len(os.listdir('/proc/self/fd')))]", "Too many"),
    ],
)
def test_what_the_kernel_refuses_makes_messages_slower(check: str, before: str, expected: str) -> None:
    kind, value = (resource.RLIMIT_FSIZE, 4096) if check == "sealed_memory" else (resource.RLIMIT_NOFILE, 200)
    found = finding_of("same_host", check, before=before, prepare=limited(kind, value))
    assert found["level"] == "warning" and expected in found["found"] and "slower" in found["found"], found


def test_a_host_whose_processes_do_not_see_each_other_makes_messages_slower(tmp_path: Path) -> None:
    prefix = mounted("size=1m", "/proc")  # hides all processes
    found = finding_of("same_host", "peers", prefix=prefix)
    assert found["level"] == "warning" and "/proc/PID/fd" in found["found"] and "see each other" in found["advice"]

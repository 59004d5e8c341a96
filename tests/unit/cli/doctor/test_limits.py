"""doctor: limits of the process, really set, and control groups, laid out as the kernel does and real ones."""

import os
import resource
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moecluster.cli.commands.doctor.cgroup import Cgroups
from tests.support.in_child import finding_of

NOBODY = 65533


def as_nobody(processes: int) -> str:
    # Another user may not read the codecs of this Python, so they are loaded first.
    return f"""
import os, resource, encodings.ascii, encodings.latin_1
resource.setrlimit(resource.RLIMIT_NPROC, ({processes},) * 2)
os.setuid({NOBODY})
"""


def limited(kind: int, value: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(kind, (value, value))

    return limit


def test_few_open_files_are_a_problem_and_fewer_than_the_gateway_takes_a_warning() -> None:
    few = finding_of("limits", "open_files", prepare=limited(resource.RLIMIT_NOFILE, 200))
    assert few["level"] == "problem" and "may open 200 files" in few["found"] and "limits.conf" in few["advice"]
    some = finding_of("limits", "open_files", prepare=limited(resource.RLIMIT_NOFILE, 1024))
    assert some["level"] == "warning" and "takes 768 connections instead of 4096" in some["found"]
    enough = finding_of("limits", "open_files", prepare=limited(resource.RLIMIT_NOFILE, 4096 + 256))
    assert enough["level"] == "ok"
    many = ("cluster.num_expert_actors=10000", "serve.max_connections=1")
    large = finding_of("limits", "open_files", *many, prepare=limited(resource.RLIMIT_NOFILE, 4096))
    assert large["level"] == "problem" and "an actor needs 80256" in large["found"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_few_processes_are_a_problem() -> None:
    found = {count: finding_of("limits", "tasks", before=as_nobody(count)) for count in (100, 600, 50_000)}
    assert [one["level"] for one in found.values()] == ["problem", "warning", "ok"]
    assert "ulimit -u" in found[100]["advice"] and "a busy cluster needs" in found[600]["found"]


def test_limits_of_addresses_and_files_are_told() -> None:
    addresses = finding_of("limits", "sizes", prepare=limited(resource.RLIMIT_AS, 8 * 2**30))
    assert addresses["level"] == "problem" and "8.0 GiB of addresses" in addresses["found"]
    addresses = finding_of("limits", "sizes", prepare=limited(resource.RLIMIT_AS, 2**40))
    assert addresses["level"] == "warning" and addresses["advice"] == "ulimit -v unlimited"
    files = finding_of("limits", "sizes", prepare=limited(resource.RLIMIT_FSIZE, 2**30))
    assert files["level"] == "warning" and "ulimit -f" in files["advice"]
    seconds = finding_of("limits", "sizes", prepare=limited(resource.RLIMIT_CPU, 1000))
    assert seconds["level"] == "warning" and "1000 s" in seconds["found"]


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def test_groups_of_version_2_have_the_smallest_limit_of_their_ancestors(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/a/b\n")
    root = tmp_path / "fs"
    write(root / "a", cpu__max="150000 100000", memory__max="max", pids__max="100", pids__current="40")
    write(
        root / "a" / "b",
        cpu__max="max 100000",
        memory__max="1000",
        memory__current="700",
        memory__stat="anon 400\ninactive_file 300",
        pids__max="max",
    )
    groups = Cgroups(root=root, own=tmp_path / "own")
    assert (groups.cpus(), groups.free_memory_bytes(), groups.free_tasks()) == (1.5, 600, 60)


def test_groups_of_version_1_are_read_and_others_have_no_limit(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("3:memory:/x\n2:pids:/x\n1:cpu,cpuacct:/\n0::/\n")
    root = tmp_path / "fs"
    write(root / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(root / "memory" / "x", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="5")
    write(root / "memory", memory__limit_in_bytes="900", memory__usage_in_bytes="1000")
    write(root / "pids" / "x", pids__max="7", pids__current="9")
    groups = Cgroups(root=root, own=tmp_path / "own")
    assert (groups.cpus(), groups.free_memory_bytes(), groups.free_tasks()) == (None, 0, 0)
    none = Cgroups(root=tmp_path / "nowhere", own=tmp_path / "nowhere")
    assert (none.cpus(), none.free_memory_bytes(), none.free_tasks()) == (None, None, None)


@pytest.fixture
def group_of_tasks() -> Iterator[Path]:
    """A real control group that counts tasks, for this test alone."""
    name = f"moecluster-test-{uuid.uuid4().hex[:8]}"
    for base in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        group = base / name
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / "pids.max").exists():
            yield group
            group.rmdir()
            return
        group.rmdir()
    pytest.skip("no control group may be made here")


def test_a_control_group_with_few_processes_is_a_problem(group_of_tasks: Path) -> None:
    (group_of_tasks / "pids.max").write_text("50")

    def join() -> None:
        (group_of_tasks / "cgroup.procs").write_text(str(os.getpid()))

    found = finding_of("limits", "tasks", prepare=join)
    assert found["level"] == "problem" and "pids.max" in found["advice"], found

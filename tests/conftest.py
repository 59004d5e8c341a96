"""Rules for every test.

- A test carries the marker of its folder (tests/rpc -> rpc). Tests in tests/gpu are skipped where torch sees no CUDA.
- One torch thread, no downloads, and the same random numbers at the start of every test.
- Ray demands a token, which commands started by a test inherit with the environment. A test that starts a Ray with
  another token takes RAY_AUTH_TOKEN out of that command's environment.
- Processes that the tests started, at any depth, must be gone when the session ends. They are known by an environment
  variable that every child inherits, so daemons that gave up their parent are found too.

Real Ray comes from the fixtures `ray_session` and `ray_namespace` of tests/support/clusters/ray_session.py, a real
Prometheus from `prometheus` of prometheus_server.py beside it.
"""

import contextlib
import os
import random
import secrets
import signal
import time
import uuid
from pathlib import Path

# Libraries read these when they are imported (Ray its RAY_AUTH_MODE, torch its OMP_NUM_THREADS): so they are set first.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray uses 127.0.0.1, not this host's network address, where its actors would not speak plain text.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# By default Ray's workers give way to all else, and starve beside it.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import numpy as np
import psutil
import pytest
import torch

from moecluster.rpc.tensors import expect_read_only_views

pytest_plugins = ["tests.support.clusters.prometheus_server", "tests.support.clusters.ray_session"]

TESTS = Path(__file__).parent
SESSION_VARIABLE = "MOECLUSTER_TEST_SESSION"
PROCESS_EXIT_TIMEOUT_S = 15.0
# Python's own helper for shared memory; it ends with the process that uses it.
TOLERATED_COMMANDS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def pytest_configure() -> None:
    os.environ[SESSION_VARIABLE] = uuid.uuid4().hex
    # Under nohup, and behind a shell script's "&", signals are ignored, also by what the tests start and then signal.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("RAY_ADDRESS", None)  # tests name their cluster
    torch.set_num_threads(1)
    expect_read_only_views()
    hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("reproducible")


def pytest_xdist_auto_num_workers() -> int:
    """Of -n auto. A third of the time tests wait: for a lease, a deadline, a child."""
    return max(2, (os.cpu_count() or 1) * 3 // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_cuda = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        layer = item.path.relative_to(TESTS).parts[0]
        item.add_marker(layer)
        if layer == "gpu" and not torch.cuda.is_available():
            item.add_marker(without_cuda)


@pytest.fixture(autouse=True)
def seeded_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def processes_of_this_session() -> dict[psutil.Process, str]:
    """Living processes, other than this one, that inherited the session's variable, with their command lines."""
    found = {}
    for process in psutil.process_iter():
        try:
            inherited = process.environ().get(SESSION_VARIABLE) == os.environ[SESSION_VARIABLE]
            if inherited and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone meanwhile, or another user's
    return {process: line for process, line in found.items() if not any(name in line for name in TOLERATED_COMMANDS)}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    deadline_s = time.monotonic() + PROCESS_EXIT_TIMEOUT_S
    while (left := processes_of_this_session()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    for process, command_line in left.items():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nleft behind by the tests: {process.pid} {command_line[:160]}")
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()

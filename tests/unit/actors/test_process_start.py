import os
import signal
import subprocess
import sys

import pytest

from actors import cluster_file, launch
from actors.cluster_file import Start
from actors.process_start import start_ticks

NAMED = "import ctypes, time; ctypes.CDLL(None).prctl(15, b') 1 (2 ('); print(flush=True); time.sleep(600)"


@pytest.fixture
def process():
    """One whose name looks like a part of its own line in /proc."""
    with subprocess.Popen([sys.executable, "-c", NAMED], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None and started.stdout.readline()
        yield started
        started.kill()


def test_a_process_is_told_from_a_later_one_of_its_pid(process) -> None:
    own, other = start_ticks(os.getpid()), start_ticks(process.pid)
    assert own is not None and other is not None and 0 < own <= other
    assert start_ticks(process.pid) == other
    process.kill()
    process.wait()
    assert start_ticks(process.pid) is None


def test_only_the_process_that_was_noted_is_signaled(process, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ticks = start_ticks(process.pid)
    assert ticks is not None

    def noted(ticks: int) -> Start:
        return Start(
            name="one", ray_address="", model="m", pid=process.pid, pid_start_ticks=ticks, local_ray=None
        )  # fmt: skip

    launch._signal_starter(noted(ticks - 1), signal.SIGKILL)
    assert process.poll() is None
    cluster_file.save(noted(ticks))
    found = cluster_file.load_start("one")
    assert found is not None
    launch._signal_starter(found, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    launch._signal_starter(found, signal.SIGKILL)

"""The wall clock is set by hours and by days, both ways, under a cluster that serves: nobody notices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clocks.serving_under_jumps import JUMPS_S, Findings
from tests.support.clocks.shifted_clock import shifted_environment
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.in_child import ROOT, TIMEOUT_S

NOT_CONNECTED = """
import time
from moecluster.rpc.channels import is_connected_within
from moecluster.rpc.server import open_channel
from tests.support.clocks.shifted_clock import set_clock
import threading
threading.Timer(0.3, set_clock, (-3 * 3600,)).start()
began_s = time.monotonic()
with open_channel("127.0.0.1:1") as channel:
    print(is_connected_within(channel, 1.0), time.monotonic() - began_s, time.time())
"""


def run(folder: Path, *command: str) -> str:
    """Returns what Python printed in a process whose clock can be set."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **shifted_environment(folder)},
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_serving_goes_on_exactly_and_nothing_expires(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    printed = run(tmp_path, "-m", "tests.support.clocks.serving_under_jumps", model)
    found = Findings(**json.loads(printed.splitlines()[-1]))
    assert found.set_to_s == pytest.approx(JUMPS_S, abs=60.0), "the clock really jumped"
    assert len(set(found.texts)) == 1 and len(found.texts) > 30, "every text, whole or cut by a jump, is the same"
    assert found.leases == [["router"]] * (1 + len(JUMPS_S))
    assert all(now == found.incarnations[0] for now in found.incarnations), "no actor was given up"
    assert not found.unasked, "nothing was restored, moved or evicted"
    for took_s, bound_s in zip(found.took_s, found.bound_s, strict=True):
        assert 0 <= took_s <= bound_s, "an operation's dates tell how long it took"


def test_a_clock_that_is_set_back_makes_no_wait_longer(tmp_path: Path) -> None:
    connected, waited_s, _ = run(tmp_path, "-c", NOT_CONNECTED).split()
    assert connected == "False" and 1.0 <= float(waited_s) < 60.0

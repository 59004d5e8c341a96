"""record: writes the load of a running cluster's experts, window by window, to a trace."""

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from actors.places import check_file
from moecluster.cli.common.cluster_choice import ClusterChoice
from moecluster.cli.common.live_controller import LiveController
from moecluster.errors import ConfigError
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.simulation.trace.recorder import TraceRecorder
from moecluster.simulation.trace.writer import TraceWriter
from moecluster.types import ActorState, ClusterLoads


def record(choice: ClusterChoice, out: str, window_s: float, for_s: float, console: Console) -> None:
    """Appends a window to the file every window_s seconds, for for_s seconds (0: until Ctrl-C)."""
    if not 0 < window_s < math.inf:
        raise ConfigError(f"--window-s: got {window_s:g}, expected more than 0 seconds")
    if for_s != 0 and not window_s <= for_s < math.inf:
        raise ConfigError(f"--for-s: got {for_s:g}, expected at least --window-s ({window_s:g}), or 0: until Ctrl-C")
    check_file("OUT", Path(out))
    with LiveController(choice) as controller:
        recorder = TraceRecorder(*controller.ask(_read), window_s)
        with TraceWriter(out, recorder.header) as trace, console.status("") as shown:
            written = 0
            try:
                for _ in _window_ends(window_s, for_s):
                    window = recorder.take(*controller.ask(_read))
                    if window is None:
                        console.print("a window is left out: the controller was away, or its clock was set")
                        continue
                    trace.add(window)
                    written += 1
                    shown.update(f"recorded windows of {window_s:g} s: {written}; Ctrl-C ends it")
            except KeyboardInterrupt:
                pass  # the usual end of a recording
            finally:
                console.print(f"windows added to {out}: {written}", highlight=False, markup=False, soft_wrap=True)


def _read(calls: ControllerCalls) -> tuple[ClusterLoads, tuple[ActorState, ...]]:
    return calls.loads(), calls.status().actors


def _window_ends(window_s: float, for_s: float) -> Iterator[None]:
    """Yields at the end of each window; skips windows that have passed already."""
    started_s = time.monotonic()
    numbers = range(1, 1 + int(for_s / window_s + 1e-9)) if for_s else itertools.count(1)
    for number in numbers:
        left_s = started_s + number * window_s - time.monotonic()
        if left_s > -window_s:
            time.sleep(max(left_s, 0.0))
            yield

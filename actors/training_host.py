"""Runs a training rank inside the first router's process: in a thread, with its events kept for polling."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moecluster.config import Config
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import MoeClusterError, StateLost, UserError
from moecluster.metrics import Metrics
from moecluster.rpc.controller.interface import PlacementHold
from moecluster.training.events import Event
from moecluster.training.history import History
from moecluster.training.loop import TrainingLoop
from moecluster.training.setup import read_data, run_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """New events of a run, and whether it has ended."""

    events: tuple[Event, ...]
    ended: bool
    error: MoeClusterError | None  # why the run failed, if it did


class RunGone(StateLost):
    """The run ended with its process; a new run may continue from the last checkpoint."""


class TrainingHost:
    """Hosts at most one run at a time."""

    def __init__(
        self,
        experts: RemoteExperts,
        placement: PlacementHold,
        *,
        announce: Callable[[str], None],
        metrics: Metrics,
    ) -> None:
        """placement: held during a run. announce: tells the controller the directory to load lost experts from."""
        self._experts = experts
        self._placement = placement
        self._announce = announce
        self._metrics = metrics
        self._events: list[Event] = []
        self._error: MoeClusterError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, config: Config, start: Path) -> None:
        """Starts a run from a directory. Raises UserError if one is in progress."""
        if self._thread is not None and self._thread.is_alive():
            raise UserError("a training run is under way in this cluster: wait for its end, or take the cluster down")
        self._events, self._error = [], None
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(config, start), name="training", daemon=True)
        self._thread.start()

    def progress(self, since: int) -> Progress:
        """Returns the events from number `since` on. Raises RunGone if no run was started in this process."""
        if self._thread is None:
            raise RunGone("the router's process was started again, and its training run is gone")
        ended = not self._thread.is_alive()
        return Progress(events=tuple(self._events[since:]), ended=ended, error=self._error if ended else None)

    def stop(self) -> None:
        """Ends the run after its current event; its last checkpoint stays."""
        self._stop.set()

    def _run(self, config: Config, start: Path) -> None:
        try:
            # Hold before reading: from now on the experts are trained where they are placed.
            self._placement.hold(config.cluster.start_timeout_s)
            try:
                self._train(config, start)
            finally:
                self._placement.release()
        except MoeClusterError as exc:
            self._error = exc
        except (RuntimeError, OSError) as exc:  # from torch and the disk
            logger.exception("the training run failed")
            self._error = MoeClusterError(f"the training run failed: {exc}")

    def _train(self, config: Config, start: Path) -> None:
        # Recorded here, not where it is shown: the history covers every checkpoint, however this process ends.
        history = History.open(config.train.output_dir)
        tokenizer = run_tokenizer(config)
        loop = TrainingLoop(
            config,
            self._experts,
            start=start,
            data=read_data(config, tokenizer),
            tokenizer=tokenizer,
            announce=self._announce,
            metrics=self._metrics,
        )
        try:
            for event in loop.run():
                history.add(event)
                self._events.append(event)
                if self._stop.is_set():
                    break
            else:
                loop.hand_over()
        finally:
            loop.close()

"""A training rank inside the first router's process: the run in a thread, its events kept for whoever asks."""

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
    """What a run has told since an earlier look."""

    events: tuple[Event, ...]
    ended: bool
    error: MoeClusterError | None  # why it ended, if not by itself


class RunGone(StateLost):
    """The run ended with the process that it ran in: another one may go on from its last checkpoint."""


class TrainingHost:
    """At most one run at a time."""

    def __init__(
        self,
        experts: RemoteExperts,
        placement: PlacementHold,
        *,
        announce: Callable[[str], None],
        metrics: Metrics,
    ) -> None:
        """placement: held while a run goes on. announce: tells the controller what lost experts are loaded from."""
        self._experts = experts
        self._placement = placement
        self._announce = announce
        self._metrics = metrics
        self._events: list[Event] = []
        self._error: MoeClusterError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, config: Config, start: Path) -> None:
        """Begins a run from a directory. Raises UserError if one is under way."""
        if self._thread is not None and self._thread.is_alive():
            raise UserError("a training run is under way in this cluster: wait for its end, or take the cluster down")
        self._events, self._error = [], None
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(config, start), name="training", daemon=True)
        self._thread.start()

    def progress(self, since: int) -> Progress:
        """Events from number `since` on; asked for in order, none is lost. Raises RunGone if no run began here."""
        if self._thread is None:
            raise RunGone("the router's process was started again, and its training run is gone")
        ended = not self._thread.is_alive()
        return Progress(events=tuple(self._events[since:]), ended=ended, error=self._error if ended else None)

    def stop(self) -> None:
        """Ends the run after what it does now; its last checkpoint stays."""
        self._stop.set()

    def _run(self, config: Config, start: Path) -> None:
        try:
            # First held, then read: the experts are trained where they stand from now on.
            self._placement.hold(config.cluster.start_timeout_s)
            try:
                self._train(config, start)
            finally:
                self._placement.release()
        except MoeClusterError as exc:
            self._error = exc
        except (RuntimeError, OSError) as exc:  # of torch and the disk
            logger.exception("the training run failed")
            self._error = MoeClusterError(f"the training run failed: {exc}")

    def _train(self, config: Config, start: Path) -> None:
        # Here, and not where it is shown: what a checkpoint contains is in the history, however this process ends.
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

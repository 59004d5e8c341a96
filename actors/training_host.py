"""Runs a training rank inside the first router's process: in a thread, with its events kept for who follows it."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from moecluster.config import Config, read_config
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import MoeClusterError, ResourceError, UserError
from moecluster.metrics import Metrics
from moecluster.models.given_directories import IsGiven, check_given
from moecluster.rpc.controller.interface import PlacementHold
from moecluster.rpc.router.training_messages import RunGone, RunProgress, StartRequest
from moecluster.training.checkpoint_store import CHECKPOINTS
from moecluster.training.events import Event, encode_event
from moecluster.training.history import History
from moecluster.training.loop import TrainingLoop
from moecluster.training.run_paths import run_paths
from moecluster.training.setup import prepare_start, read_data, run_tokenizer

logger = logging.getLogger(__name__)


class TrainingHost:
    """A TrainingHandler: hosts at most one run at a time."""

    def __init__(
        self,
        experts: RemoteExperts,
        placement: PlacementHold,
        *,
        announce: Callable[[str], None],
        is_given: IsGiven,
        served: Callable[[], str],
        metrics: Metrics,
    ) -> None:
        """placement: held during a run. announce: tells the controller the directory to load lost experts from.
        is_given: whether a run may read or write a path. served: returns the directory that the cluster serves."""
        self._experts = experts
        self._placement = placement
        self._announce = announce
        self._is_given = is_given
        self._served = served
        self._metrics = metrics
        self._lock = threading.Lock()
        self._run_id = ""
        self._events: list[str] = []
        self._error: MoeClusterError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, request: StartRequest) -> None:
        """Begins a run. Does nothing if the run of this id has begun. Raises UserError: for wrong settings or paths, or
        if another run is going on."""
        config = read_config(request.settings)
        for path in run_paths(config, request.start):
            check_given(path, self._is_given)
        with self._lock:
            if self._thread is not None and request.run_id == self._run_id:
                return
            if self._thread is not None and self._thread.is_alive():
                raise UserError(
                    "a training run is under way in this cluster: wait for its end, or take the cluster down"
                )
            self._run_id, self._events, self._error = request.run_id, [], None
            self._stop.clear()
            self._thread = threading.Thread(
                target=self._run, args=(config, request.start), name="training", daemon=True
            )
            self._thread.start()

    def progress(self, run_id: str, since: int) -> RunProgress:
        """Returns the events from number `since` on. Raises RunGone if no such run was started in this process."""
        with self._lock:
            if self._thread is None or run_id != self._run_id:
                raise RunGone("the router's process was started again, and its training run is gone")
            ended = not self._thread.is_alive()
            return RunProgress(events=tuple(self._events[since:]), ended=ended, error=self._error if ended else None)

    def stop(self, run_id: str) -> None:
        """Ends the run after its current event; its last checkpoint stays."""
        with self._lock:
            if run_id == self._run_id:
                self._stop.set()

    def _run(self, config: Config, start: str) -> None:
        try:
            begin = Path(start) if start else self._own_start(config)
            # Hold before reading: from now on the experts are trained where they are placed.
            self._placement.hold(config.cluster.start_timeout_s)
            try:
                self._train(config, begin)
            finally:
                self._placement.release()
        except MoeClusterError as exc:
            self._error = exc
        except (RuntimeError, OSError) as exc:  # from torch and the disk
            logger.exception("the training run failed")
            self._error = MoeClusterError(f"the training run failed: {exc}")

    def _own_start(self, config: Config) -> Path:
        """Returns the checkpoint to begin from. Raises UserError, also if the cluster serves what is not of this
        run."""
        start = prepare_start(config).resolve()
        served, checkpoints = Path(self._served()), (Path(config.train.output_dir) / CHECKPOINTS).resolve()
        if served in (start, Path(config.model.path)) or served.parent == checkpoints:
            return start
        raise UserError(
            f"the cluster serves {served}, which is not of this run ({start}); take it down first, or train in another"
        )

    def _record(self, history: History, event: Event, config: Config) -> None:
        try:
            history.add(event)
        except ResourceError as exc:
            if config.train.checkpoint_errors == "stop":
                raise
            logger.warning("%s", exc)

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
                self._record(history, event, config)
                self._events.append(encode_event(event))
                if self._stop.is_set():
                    break
            else:
                loop.hand_over()
        finally:
            loop.close()

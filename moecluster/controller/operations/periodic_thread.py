"""A thread that calls a function periodically, and at once when it is woken."""

import logging
import threading
from collections.abc import Callable

from moecluster.errors import MoeClusterError

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
FAILED_INSIDE = "internal error in the controller; see its log"  # detail of an operation that a bug has ended


class PeriodicThread:
    """Runs from start to close."""

    def __init__(
        self,
        name: str,
        do_round: Callable[[], None],
        *,
        period_s: Callable[[], float],
        without_result: str,
        on_bug: Callable[[], None],
    ) -> None:
        """period_s is called before every round. without_result: what is logged if a round raises. on_bug is called if
        it raises anything but a MoeClusterError."""
        self._do_round = do_round
        self._period_s = period_s
        self._without_result = without_result
        self._on_bug = on_bug
        self._warned = ""  # of which error; the same one is not logged again
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def closed(self) -> bool:
        """Whether the current round should end soon."""
        return self._closed.is_set()

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Starts a round at once, or after the current one."""
        self._wake.set()

    def close(self) -> None:
        """Stops the thread; waits up to CLOSE_TIMEOUT_S for the current round."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self._period_s())
            self._wake.clear()
            if self._closed.is_set():
                return
            try:
                self._do_round()
                self._warned = ""
            except MoeClusterError as exc:
                if str(exc) != self._warned:
                    logger.warning("%s: %s", self._without_result, exc)
                self._warned = str(exc)
            except Exception:
                logger.exception("%s", self._without_result)  # a bug, which must not prevent later rounds
                self._on_bug()

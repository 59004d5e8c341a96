"""A client of training runs in a cluster's first router, wherever that is now."""

import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from moecluster.errors import Unavailable
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.client import RouterCalls
from moecluster.rpc.router.training_messages import RunProgress, StartRequest

AnswerT = TypeVar("AnswerT")


class TrainingRun:
    """Begins, follows and stops one run at a time. Every call ends within a finite time; after Unavailable, the next
    call looks for the router anew."""

    def __init__(
        self,
        *,
        find_first: Callable[[], str],
        find_all: Callable[[], Iterable[str]],
        credentials: ClusterCredentials | None,
    ) -> None:
        """find_first: returns host:port of the first router, find_all of all. Both may raise a MoeClusterError."""
        self._find_first = find_first
        self._find_all = find_all
        self._credentials = credentials
        self._calls: RouterCalls | None = None
        self._run_id = ""

    def start(self, settings: Mapping[str, Any], start: str) -> None:
        """Begins a new run. settings: by section. start: the checkpoint to begin from; empty: the router chooses.
        Raises UserError."""
        self._run_id = secrets.token_hex(8)
        request = StartRequest(run_id=self._run_id, settings=settings, start=start)
        self._ask(lambda calls: calls.start_training(request))

    def progress(self, since: int) -> RunProgress:
        """Returns the run's events from number `since` on. Raises RunGone if the router's process has no such run."""
        return self._ask(lambda calls: calls.follow_training(self._run_id, since))

    def stop(self) -> None:
        """Ends the run after its current event."""
        self._ask(lambda calls: calls.stop_training(self._run_id))

    def reload(self, checkpoint: str) -> None:
        """Has every router load trunk and tokenizer from a directory that the controller has already."""
        for address in self._find_all():
            # A router that is being restarted loads the directory that the controller names.
            with suppress(Unavailable), RouterCalls(address, credentials=self._credentials) as calls:
                calls.reload(checkpoint)

    def close(self) -> None:
        """Closes the connection; the run goes on."""
        if self._calls is not None:
            self._calls.close()
            self._calls = None

    def _ask(self, question: Callable[[RouterCalls], AnswerT]) -> AnswerT:
        if self._calls is None:
            self._calls = RouterCalls(self._find_first(), credentials=self._credentials)
        try:
            return question(self._calls)
        except Unavailable:
            self.close()
            raise

"""Calls the controller of a running cluster, wherever it listens now."""

import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from actors import cluster_file
from actors.launch import credentials_of, join, leave
from moecluster.cli.common.console import make_console
from moecluster.cli.common.lookup import found
from moecluster.errors import DeadlineExceeded, Unavailable
from moecluster.rpc.controller.client import ControllerCalls

if TYPE_CHECKING:
    from actors.driver import Cluster

PATIENCE_S = 30.0  # Ray restarts a controller within 15 s on a slow machine
RETRY_S = 0.5

AnswerT = TypeVar("AnswerT")


class LiveController:
    """The controller of a cluster that `up` recorded. A restarted controller listens elsewhere.

    Joining Ray takes seconds, so the recorded address is tried first; only if it does not answer, Ray is asked for the
    new one, which is then recorded.
    """

    def __init__(self, name: str) -> None:
        """Raises ClusterNotFound if no cluster of that name is up."""
        self._cluster = found(name)
        self._credentials = credentials_of(self._cluster)
        self._calls = ControllerCalls(self._cluster.controller_address, credentials=self._credentials)
        self._joined: Cluster | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.close()
        if self._joined is not None:
            leave()

    def ask(self, question: Callable[[ControllerCalls], AnswerT]) -> AnswerT:
        """Returns the answer. A question may be sent more than once, so changes need an operation id.

        Waits while the controller restarts; raises Unavailable if it is not back in time.
        """
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return question(self._calls)
            except Unavailable:
                if time.monotonic() > deadline_s:
                    raise
                self._try_elsewhere()

    def _try_elsewhere(self) -> None:
        if self._joined is None:
            message = f"no controller answers at {self._calls.address}; asking Ray where it is now"
            make_console(stderr=True).print(message)
            self._joined = join(self._cluster.name, self._cluster.ray_address, self._cluster.local_ray)
        try:
            address = self._joined.controller_address()
        except (Unavailable, DeadlineExceeded):
            address = self._calls.address  # it is being restarted
        if address == self._calls.address:
            time.sleep(RETRY_S)
            return
        self._calls.close()
        self._calls = ControllerCalls(address, credentials=self._credentials)
        noted = cluster_file.load(self._cluster.name)
        if noted is not None:
            cluster_file.save(replace(noted, controller_address=address))

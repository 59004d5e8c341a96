"""Asking the controller of a cluster that is up, wherever it listens now."""

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

PATIENCE_S = 30.0  # Ray starts a controller anew within 15 s on a slow machine
RETRY_S = 0.5

AnswerT = TypeVar("AnswerT")


class LiveController:
    """The controller of a cluster that `up` noted. A controller that was started anew listens elsewhere.

    Joining Ray takes seconds, so the noted address is tried first; only if nobody answers there, Ray is asked for the
    new one, which is noted then.
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
        """The answer. A question may be asked more than once: an order needs an id.

        Waits while the controller is started anew; raises Unavailable if it is not back in time.
        """
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return question(self._calls)
            except Unavailable:
                if time.monotonic() > deadline_s:
                    raise
                self._look_elsewhere()

    def _look_elsewhere(self) -> None:
        if self._joined is None:
            said = f"no controller answers at {self._calls.address}; asking Ray where it is now"
            make_console(stderr=True).print(said)
            self._joined = join(self._cluster.name, self._cluster.ray_address, self._cluster.local_ray)
        try:
            address = self._joined.controller_address()
        except (Unavailable, DeadlineExceeded):
            address = self._calls.address  # it is being started
        if address == self._calls.address:
            time.sleep(RETRY_S)
            return
        self._calls.close()
        self._calls = ControllerCalls(address, credentials=self._credentials)
        noted = cluster_file.load(self._cluster.name)
        if noted is not None:
            cluster_file.save(replace(noted, controller_address=address))

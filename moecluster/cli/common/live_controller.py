"""Calls the controller of a running cluster, wherever it listens now."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from actors import cluster_file
from actors.cluster_file import UpCluster
from actors.launch import credentials_of, join, leave
from moecluster.cli.common.cluster_choice import ClusterChoice, RemoteCluster, routers_in
from moecluster.cli.common.console import make_console
from moecluster.cli.common.lookup import found
from moecluster.errors import DeadlineExceeded, MoeClusterError, TlsMismatch, Unauthenticated, Unavailable
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.client import RouterCalls
from moecluster.rpc.tls.mismatch import mismatch_at

if TYPE_CHECKING:
    from actors.driver import Cluster

PATIENCE_S = 30.0  # Ray restarts a controller within 15 s on a slow machine
RETRY_S = 0.5

AnswerT = TypeVar("AnswerT")


class _Whereabouts(Protocol):
    """Knows where a cluster's controller is."""

    address: str  # host:port where it was last
    credentials: ClusterCredentials | None
    elsewhere: str  # how it is found if it is not there, for the user

    def answered(self, calls: ControllerCalls) -> None:
        """Is told that the controller has answered."""

    def final(self, error: Unavailable) -> Unavailable | None:
        """Returns the error to end with if waiting does not help, else None."""

    def find(self) -> str:
        """Returns where the controller is now. Raises Unavailable or DeadlineExceeded while nobody knows."""

    def close(self) -> None:
        """Ends what finding it has begun."""


class LiveController:
    """The controller of a cluster. A restarted controller may listen elsewhere.

    Of a cluster that `up` recorded here, Ray says where: but joining it takes seconds, so it is asked only if the
    recorded address does not answer. Of another cluster its routers say.
    """

    def __init__(self, choice: ClusterChoice) -> None:
        """Raises ClusterNotFound if no cluster of that name is up, ConfigError without credentials for an address."""
        self._where: _Whereabouts = _AtAddress(RemoteCluster(choice)) if choice.address else _Recorded(choice.name)
        self._calls = ControllerCalls(self._where.address, credentials=self._where.credentials)
        self._told = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.close()
        self._where.close()

    def ask(self, question: Callable[[ControllerCalls], AnswerT]) -> AnswerT:
        """Returns the answer. A question may be sent more than once, so changes need an operation id.

        Waits while the controller restarts; raises Unavailable if it is not back in time.
        """
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = question(self._calls)
                self._where.answered(self._calls)
                return answer
            except Unavailable as exc:
                if time.monotonic() > deadline_s:
                    raise
                if (final := self._where.final(exc)) is not None:
                    raise final from exc
                self._try_elsewhere()

    def _try_elsewhere(self) -> None:
        if not self._told:
            message = f"no controller answers at {self._calls.address}; {self._where.elsewhere}"
            make_console(stderr=True).print(message)
            self._told = True
        try:
            address = self._where.find()
        except (Unavailable, DeadlineExceeded):
            address = self._calls.address  # it is being restarted
        if address == self._calls.address:
            time.sleep(RETRY_S)
            return
        self._calls.close()
        self._calls = ControllerCalls(address, credentials=self._where.credentials)


class _Recorded:
    """A cluster that `up` recorded here."""

    elsewhere = "asking Ray where it is now"

    def __init__(self, name: str) -> None:
        self._cluster: UpCluster = found(name)
        self.address = self._cluster.controller_address
        self.credentials = credentials_of(self._cluster)
        self._joined: Cluster | None = None

    def answered(self, calls: ControllerCalls) -> None:
        """Records a new address."""
        if calls.address == self.address:
            return
        self.address = calls.address
        noted = cluster_file.load(self._cluster.name)
        if noted is not None:
            cluster_file.save(replace(noted, controller_address=calls.address))

    def final(self, error: Unavailable) -> None:
        """No error is: another cluster may have taken the port of the controller."""

    def find(self) -> str:
        if self._joined is None:
            self._joined = join(self._cluster.name, self._cluster.ray_address, self._cluster.local_ray)
        return self._joined.controller_address()

    def close(self) -> None:
        if self._joined is not None:
            leave()


class _AtAddress:
    """A cluster that is known by its controller's address. Its routers keep finding the controller by themselves."""

    def __init__(self, cluster: RemoteCluster) -> None:
        self.address = cluster.address
        self.credentials: ClusterCredentials | None = cluster.credentials
        self.elsewhere = f"trying for {PATIENCE_S:g} s"
        self._routers: tuple[str, ...] = ()

    def answered(self, calls: ControllerCalls) -> None:
        """Takes note of the routers, once."""
        if not self._routers:
            with suppress(MoeClusterError):
                self._routers = routers_in(calls.status())

    def final(self, error: Unavailable) -> Unavailable | None:
        if self._routers:  # it has answered: something else has its port now
            return None
        if isinstance(error, Unauthenticated | TlsMismatch):
            return error
        return mismatch_at(self.address, self.credentials)

    def find(self) -> str:
        for router in self._routers:
            with suppress(MoeClusterError), RouterCalls(router, credentials=self.credentials) as calls:
                if address := calls.status().controller:
                    return address
        raise Unavailable("no router knows where the controller is")

    def close(self) -> None:
        """There is nothing to end."""

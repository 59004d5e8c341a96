"""What the blocking and the asyncio client share: routers, connections, replies to Cancel."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

import grpc
import grpc.aio

from moecluster.client.failover import Route, Routers
from moecluster.errors import ConfigError, MoeClusterError, Unavailable
from moecluster.rpc.credentials import ClusterCredentials, given_credentials, read_secret
from moecluster.rpc.status_codes import from_rpc_error

STATUS_TIMEOUT_S = 5.0

ChannelT = TypeVar("ChannelT", grpc.Channel, grpc.aio.Channel)
DiscoverT = TypeVar("DiscoverT")


class ClusterClient(ABC, Generic[ChannelT, DiscoverT]):
    """Knows the routers of one cluster."""

    def __init__(
        self,
        addresses: str | Iterable[str],
        *,
        timeout_s: float = 600.0,
        patience_s: float = 0.0,
        discover: DiscoverT | None = None,
        credentials: ClusterCredentials | None = None,
        secret_file: str | Path | None = None,
        tls_dir: str | Path | None = None,
    ) -> None:
        """addresses: host:port of a router, or of several of one cluster.

        timeout_s: deadline of a whole request. patience_s: how long a request waits for a router when all are lost or
        full. discover: returns the routers' current addresses, called when all known routers failed.
        credentials: the cluster secret, or a token; or secret_file: the file to read it from. By default the file that
        $MOECLUSTER_SECRET_FILE names, if any. tls_dir: folder of certificates (ca.crt, tls.crt, tls.key) for a cluster
        with security.tls_dir; by default that of the credentials, or the one that $MOECLUSTER_TLS_DIR names.

        Raises ConfigError for a file that cannot be read or holds no secret, and for certificates that cannot be used.
        """
        if credentials is None:
            credentials = read_secret(secret_file) if secret_file else given_credentials()
        if tls_dir is not None:
            if credentials is None:
                raise ConfigError("tls_dir: expected credentials or secret_file with it, for the cluster asks for both")
            credentials = replace(credentials, tls_dir=os.path.abspath(tls_dir))
        self._routers = Routers([addresses] if isinstance(addresses, str) else addresses)
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._discover = discover
        self._channels: Channels[ChannelT] = Channels(lambda address: self._open(address, credentials))

    @abstractmethod
    def _open(self, address: str, credentials: ClusterCredentials | None) -> ChannelT:
        """Opens a new connection."""

    def _route_of_generation(self) -> Route:
        return Route(
            self._routers,
            patience_s=self._patience_s,
            timeout_s=self._timeout_s,
            discovers=self._discover is not None,
        )

    def _route_of_call(self) -> Route:
        """A route that tries every router once."""
        return Route(self._routers, patience_s=0.0, timeout_s=0.0, discovers=self._discover is not None)


class Channels(Generic[ChannelT]):
    """Connections, opened on first use. Thread-safe. The caller closes the connections that it drops."""

    def __init__(self, open_channel: Callable[[str], ChannelT]) -> None:
        self._open_channel: Callable[[str], ChannelT] = open_channel
        self._lock = Lock()
        self._open: dict[str, ChannelT] = {}
        self._closed = False

    def to(self, address: str) -> ChannelT:
        """Returns the connection to an address. Raises MoeClusterError once closed."""
        with self._lock:
            if self._closed:
                raise MoeClusterError("this client is closed")
            if address not in self._open:
                self._open[address] = self._open_channel(address)
            return self._open[address]

    def keep(self, addresses: Collection[str]) -> list[ChannelT]:
        """Drops and returns the connections to all other addresses."""
        with self._lock:
            return [self._open.pop(address) for address in self._open.keys() - set(addresses)]

    def close(self) -> list[ChannelT]:
        """Drops and returns all connections."""
        with self._lock:
            self._closed = True
            given_up = list(self._open.values())
            self._open.clear()
            return given_up


class CancelAnswers:
    """Collects the routers' replies to a Cancel."""

    def __init__(self) -> None:
        self._found = False
        self._answered = False
        self._lost = Unavailable("there is no router to ask")

    def add(self, found: bool) -> None:
        """Adds a router's reply."""
        self._answered = True
        self._found |= found

    @contextmanager
    def asking(self, address: str) -> Iterator[None]:
        """Context of one call: notes a lost router; raises any other error as a MoeClusterError."""
        try:
            yield
        except grpc.RpcError as exc:
            error = from_rpc_error(exc, f"router at {address}")
            if not isinstance(error, Unavailable):
                raise error from exc
            self._lost = error

    def found(self) -> bool:
        """Whether any router knew the request. Raises Unavailable if none answered."""
        if not self._answered:
            raise self._lost
        return self._found

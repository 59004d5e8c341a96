"""The shell of a checkpoint source, on the node that has the directory; and how other actors find it."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray

from actors.names import SOURCE, Endpoints
from actors.node_address import listen_address, own_endpoints
from actors.ray_calls import call, find_actor
from actors.restart_policy import restart_on_init_failure
from moecluster.config import read_config
from moecluster.errors import CheckpointError, MoeClusterError, Unavailable
from moecluster.models.checkpoint.reader import Checkpoint, OpenCheckpoint
from moecluster.rpc.checkpoint.client import RemoteFiles, SourceAddress
from moecluster.rpc.checkpoint.server import Announcements, serve_checkpoints
from moecluster.rpc.credentials import ClusterCredentials

FIND_TIMEOUT_S = 10.0


class CheckpointSource:
    """Serves the directories announced to it. Callers authenticated by Ray get their ids."""

    @restart_on_init_failure
    def __init__(self, tables: Mapping[str, Any], credentials: ClusterCredentials, directory: str) -> None:
        """directory: announced at once, also after a restart."""
        self._announcements = Announcements()
        listen = listen_address(read_config(tables))
        self._server = serve_checkpoints(self._announcements, credentials=credentials, listen=listen)
        self.announce(directory, directory)

    def announce(self, name: str, directory: str) -> None:
        """name: the directory's name in requests. Raises CheckpointError if it is not a model's directory."""
        self._announcements.add(name, directory)

    def locate(self, name: str) -> SourceAddress | None:
        """Returns where the directory can be read; None if there is no such model on this node.

        A directory that was announced only to an earlier incarnation of this source is announced again.
        """
        announced = self._announcements.named(name)
        if announced is None:
            with suppress(CheckpointError):
                announced = self._announcements.add(name, name)
        return SourceAddress(address=self._server.address, id=announced.id) if announced is not None else None

    def endpoints(self) -> Endpoints:
        """Returns the addresses of the process."""
        return own_endpoints(SOURCE, self._server)


def checkpoint_opener(namespace: str, credentials: ClusterCredentials) -> OpenCheckpoint:
    """Returns a function that opens a checkpoint that this node does not see, from the namespace's source."""

    def open_elsewhere(name: str) -> Checkpoint:
        return Checkpoint.of(RemoteFiles(name, lambda: _locate(name, namespace), credentials=credentials))

    return open_elsewhere


def _locate(name: str, namespace: str) -> SourceAddress:
    nobody = CheckpointError(f"{name}: no such directory on this node ({_node()}), and no node has announced it")
    try:
        source = find_actor(SOURCE, namespace)
    except Unavailable as exc:
        raise nobody from exc
    found: SourceAddress | None = call(source.locate.remote(name), FIND_TIMEOUT_S, SOURCE)
    if found is None:
        raise nobody
    return found


def _node() -> str:
    return str(ray.util.get_node_ip_address())


def announce(namespace: str, directory: str) -> None:
    """Lets other nodes read one more directory of the source's node. Does nothing without a source.

    Raises CheckpointError if the source does not see it.
    """
    try:
        source = find_actor(SOURCE, namespace)
    except MoeClusterError:
        return
    call(source.announce.remote(directory, directory), FIND_TIMEOUT_S, SOURCE)

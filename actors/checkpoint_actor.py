"""The shell of a checkpoint source, on the node that has the directory; and how the other actors find it."""

import os
from contextlib import suppress

import ray

from actors.names import SOURCE, Endpoints
from actors.ray_calls import call, find_actor
from actors.restart_policy import begins_again
from moecluster.errors import CheckpointError, MoeClusterError, Unavailable
from moecluster.models.checkpoint.reader import Checkpoint, OpenCheckpoint
from moecluster.rpc.checkpoint.client import RemoteFiles, SourceAddress
from moecluster.rpc.checkpoint.server import Announcements, serve_checkpoints
from moecluster.rpc.credentials import ClusterCredentials

FIND_TIMEOUT_S = 10.0


class CheckpointSource:
    """Serves the directories that were announced to it. Who may call it, over Ray, learns their ids."""

    @begins_again
    def __init__(self, directory: str, credentials: ClusterCredentials, host: str) -> None:
        """directory: announced at once, also after a restart."""
        self._announcements = Announcements()
        self._server = serve_checkpoints(self._announcements, credentials=credentials, host=host)
        self.announce(directory, directory)

    def announce(self, name: str, directory: str) -> None:
        """name: what orders call the directory. Raises CheckpointError if it is no model's."""
        self._announcements.add(name, directory)

    def locate(self, name: str) -> SourceAddress | None:
        """Where the directory is read; None if there is no such model here under that name.

        One that is served and was announced to an earlier life of this source is announced again.
        """
        announced = self._announcements.named(name)
        if announced is None:
            with suppress(CheckpointError):
                announced = self._announcements.add(name, name)
        return SourceAddress(address=self._server.address, id=announced.id) if announced is not None else None

    def endpoints(self) -> Endpoints:
        """Where the process is reached."""
        return Endpoints(actor=SOURCE, pid=os.getpid(), address=self._server.address, metrics_address="")


def checkpoint_opener(namespace: str, credentials: ClusterCredentials) -> OpenCheckpoint:
    """A function that opens a checkpoint which this node does not see, out of the namespace's source."""

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
    """Lets the other nodes read one more directory of the source's node. Nothing to do where there is no source.

    Raises CheckpointError if the source does not see it.
    """
    try:
        source = find_actor(SOURCE, namespace)
    except MoeClusterError:
        return
    call(source.announce.remote(directory, directory), FIND_TIMEOUT_S, SOURCE)

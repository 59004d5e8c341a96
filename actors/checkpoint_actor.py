"""The shell of a checkpoint source, on the node that has the directory; and how other actors find it."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray

from actors.names import SOURCE, Endpoints, is_source
from actors.node_address import listen_address, own_endpoints
from actors.ray_calls import call, find_actor, named_actors
from actors.restart_policy import restart_on_init_failure
from actors.spawn import spawn
from moecluster.config import Config, read_config
from moecluster.errors import CheckpointError, DeadlineExceeded, MoeClusterError, Unavailable
from moecluster.models.checkpoint.reader import Checkpoint, OpenCheckpoint
from moecluster.rpc.checkpoint.client import RemoteFiles, SourceAddress
from moecluster.rpc.checkpoint.server import Announcements, serve_checkpoints
from moecluster.rpc.credentials import ClusterCredentials

FIND_TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0  # of a source
NODE_CHARACTERS = 12  # of a node's id, in the name of its source


class CheckpointSource:
    """Serves the directories announced to it. Callers authenticated by Ray get their ids."""

    @restart_on_init_failure
    def __init__(self, tables: Mapping[str, Any], credentials: ClusterCredentials, directory: str) -> None:
        """directory: announced at once, also after a restart, unless it is gone by then."""
        self._announcements = Announcements()
        listen = listen_address(read_config(tables))
        self._server = serve_checkpoints(self._announcements, credentials=credentials, listen=listen)
        with suppress(CheckpointError):
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
    """Asks every source. Raises CheckpointError if none has the directory, Unavailable or DeadlineExceeded if none has
    it and one does not answer."""
    silent: MoeClusterError | None = None
    for source in filter(is_source, named_actors(namespace)):
        try:
            found: SourceAddress | None = call(
                find_actor(source, namespace).locate.remote(name), FIND_TIMEOUT_S, source
            )
        except (Unavailable, DeadlineExceeded) as exc:
            silent = exc
            continue
        if found is not None:
            return found
    raise silent or CheckpointError(f"{name}: no such directory on this node ({_node()}), and no node has announced it")


def _node() -> str:
    return str(ray.util.get_node_ip_address())


def announce_here(config: Config, credentials: ClusterCredentials, directory: str) -> None:
    """Lets other nodes read a directory of this node, if there are other nodes: from a source that sees it, or from one
    that is started here."""
    namespace = config.cluster.name
    if not any(map(is_source, named_actors(namespace))):
        return
    with suppress(MoeClusterError):
        _locate(directory, namespace)
        return
    node = ray.get_runtime_context().get_node_id()
    name = f"{SOURCE}-{node[:NODE_CHARACTERS]}"
    source = spawn(CheckpointSource, "source", config, name, config.to_tables(), credentials, directory, node=node)
    call(source.announce.remote(directory, directory), START_TIMEOUT_S, name)


def announce(namespace: str, directory: str) -> None:
    """Lets other nodes read one more directory of the source's node. Does nothing without a source.

    Raises CheckpointError if the source does not see it.
    """
    try:
        source = find_actor(SOURCE, namespace)
    except MoeClusterError:
        return
    call(source.announce.remote(directory, directory), FIND_TIMEOUT_S, SOURCE)

"""Serves checkpoint directories of this host to nodes that do not see them.

Trust: a client that knows a directory's unguessable id may read its files, and nothing else. The files are those that
existed when the directory was announced, by their names: weights, configuration, tokenizer, and what a training run has
written in training/. Symbolic links among them are followed, since download caches use them: whoever announces a
directory is responsible for them.
"""

import os
import secrets
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc

from moecluster.addresses import ListenAddress
from moecluster.errors import CheckpointError, InvalidMessage, MoeClusterError, StaleRequest
from moecluster.models.checkpoint.files import METADATA_NAME, LocalFiles
from moecluster.models.checkpoint.training_progress import TRAINING_STATE
from moecluster.proto import checkpoint_pb2, checkpoint_pb2_grpc
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.server import LOOPBACK, RunningServer, start_server
from moecluster.rpc.status_codes import abort_with, answer

SERVICE = checkpoint_pb2.DESCRIPTOR.services_by_name["CheckpointService"].full_name
CHUNK_BYTES = 2**20
MAX_ANNOUNCED = 8  # directories; beyond it the oldest is dropped
MAX_METADATA_BYTES = 64 * 2**20  # of one file that is not weights; a larger one is left out
MAX_READS = 64  # at once, of all clients
ID_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Announced:
    """A directory whose files clients may read."""

    id: str
    directory: Path
    sizes: Mapping[str, int]  # file name -> bytes


class Announcements:
    """The announced directories by name. Thread-safe."""

    def __init__(self) -> None:
        self._by_name: dict[str, Announced] = {}
        self._lock = threading.Lock()

    def add(self, name: str, directory: str | Path) -> Announced:
        """Announces a directory with its current files. name: how others refer to it. Raises CheckpointError if it
        holds no model."""
        files = LocalFiles(directory)
        sizes = {**files.weights(), **files.optimizer_files()}
        for file in (*files.path.iterdir(), files.path / TRAINING_STATE):
            if METADATA_NAME.fullmatch(file.name) and file.is_file() and file.stat().st_size <= MAX_METADATA_BYTES:
                sizes[str(file.relative_to(files.path))] = file.stat().st_size
        announced = Announced(id=secrets.token_urlsafe(ID_BYTES), directory=files.path, sizes=sizes)
        with self._lock:
            self._by_name.pop(name, None)
            self._by_name[name] = announced
            while len(self._by_name) > MAX_ANNOUNCED:
                del self._by_name[next(iter(self._by_name))]
        return announced

    def named(self, name: str) -> Announced | None:
        """Returns a directory; None if no one has announced it."""
        with self._lock:
            return self._by_name.get(name)

    def with_id(self, id: str) -> Announced:
        """Returns the directory of an id. Raises StaleRequest for an unknown or expired id."""
        with self._lock:
            announced = list(self._by_name.values())
        for found in announced:
            if secrets.compare_digest(found.id.encode(), id.encode()):
                return found
        raise StaleRequest("id: no checkpoint of this id is announced")


class CheckpointServicer(checkpoint_pb2_grpc.CheckpointServiceServicer):
    """Checks requests and reads the files."""

    def __init__(self, announcements: Announcements) -> None:
        self._announcements = announcements

    def Files(
        self, request: checkpoint_pb2.CheckpointFilesRequest, context: grpc.ServicerContext
    ) -> checkpoint_pb2.CheckpointFilesReply:
        def files() -> checkpoint_pb2.CheckpointFilesReply:
            sizes = self._announcements.with_id(request.id).sizes
            return checkpoint_pb2.CheckpointFilesReply(
                files=[checkpoint_pb2.CheckpointFile(name=name, size_bytes=size) for name, size in sizes.items()]
            )

        return answer(context, files)

    def Read(
        self, request: checkpoint_pb2.CheckpointReadRequest, context: grpc.ServicerContext
    ) -> Iterator[checkpoint_pb2.CheckpointChunk]:
        try:
            announced = self._announcements.with_id(request.id)
            size = announced.sizes.get(request.name)
            if size is None:
                raise InvalidMessage("name", "the checkpoint has no such file")
            if request.begin + request.num_bytes > size:
                raise InvalidMessage(
                    "num_bytes", f"{request.num_bytes} from {request.begin} on, and {request.name} has {size}"
                )
            yield from _chunks(announced.directory / request.name, size, request.begin, request.num_bytes)
        except MoeClusterError as exc:
            abort_with(context, exc)


def _chunks(file: Path, size: int, begin: int, num_bytes: int) -> Iterator[checkpoint_pb2.CheckpointChunk]:
    try:
        with file.open("rb", buffering=0) as handle:
            if os.fstat(handle.fileno()).st_size != size:
                raise CheckpointError(f"{file} has changed since it was announced")
            end = begin + num_bytes
            while begin < end:
                content = os.pread(handle.fileno(), min(CHUNK_BYTES, end - begin), begin)
                if not content:
                    raise CheckpointError(f"{file} is torn: it ends {end - begin} bytes too soon")
                yield checkpoint_pb2.CheckpointChunk(begin=begin, content=content, crc32=zlib.crc32(content))
                begin += len(content)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def serve_checkpoints(
    announcements: Announcements,
    *,
    credentials: ClusterCredentials | None,
    listen: ListenAddress = LOOPBACK,
) -> RunningServer:
    """Serves all announced directories, present and future. credentials as in start_server.

    Raises ResourceError if it cannot listen.
    """
    add_servicer = partial(
        checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server, CheckpointServicer(announcements)
    )
    return start_server(SERVICE, add_servicer, listen=listen, credentials=credentials, max_calls=MAX_READS)

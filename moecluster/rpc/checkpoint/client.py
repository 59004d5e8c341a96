"""Client of the checkpoint service: reads the files of a checkpoint on another host.

Trust: the server sends the checkpoint's bytes; the checksums only guard against accidents. Names and sizes are checked
before anything is written here. Only configuration and tokenizer are written, bounded in size, to a temporary folder
that is removed after its last use. Weights are never written: each range goes straight to its destination.
"""

import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc

from moecluster.errors import (
    CheckpointError,
    DeadlineExceeded,
    Exhausted,
    InvalidMessage,
    ResourceError,
    StaleRequest,
    Unavailable,
)
from moecluster.models.checkpoint.files import CONFIG_NAME, METADATA_NAME, TRAINING_FOLDER, WEIGHTS_NAME, Seen
from moecluster.models.checkpoint.training_progress import TRAINING_STATE
from moecluster.proto import checkpoint_pb2
from moecluster.proto.checkpoint_pb2_grpc import CheckpointServiceStub
from moecluster.rpc.channels import is_connected_within
from moecluster.rpc.checkpoint.locked_folder import HeldFolder
from moecluster.rpc.checkpoint.server import MAX_METADATA_BYTES
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error

RANGE_BYTES = 64 * 2**20  # of one call
CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 60.0  # of one range
ATTEMPTS = 3
PAUSE_S = 0.5  # before another attempt
BUSY_TIMEOUT_S = 120.0  # how long to retry a busy source
MAX_FILES = 10_000
MAX_ALL_METADATA_BYTES = 256 * 2**20
OPTIMIZER_NAME = re.compile(rf"{TRAINING_FOLDER}/{WEIGHTS_NAME.pattern}")


@dataclass(frozen=True, kw_only=True)
class SourceAddress:
    """Where to read an announced checkpoint."""

    address: str  # host:port of its CheckpointService
    id: str


ResultT = TypeVar("ResultT")
_PASSING = (Unavailable, DeadlineExceeded, StaleRequest, InvalidMessage)  # retried over a new connection

Locate = Callable[[], SourceAddress]  # raises a MoeClusterError if no one has announced the checkpoint


class RemoteFiles:
    """CheckpointFiles of another host. Reconnects a few times if the connection breaks; every call has a timeout."""

    def __init__(self, path: str | Path, locate: Locate, *, credentials: ClusterCredentials | None = None) -> None:
        """Fetches all files except the weights. path: the directory's name at the user.

        Raises CheckpointError if it holds no model, Unavailable or DeadlineExceeded if it cannot be reached,
        ResourceError if the files cannot be written here.
        """
        self.path = Path(path)
        self._locate = locate
        self._credentials = credentials
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._closed = threading.Event()
        sizes = _checked_sizes(self._again(_Connection.files))
        self._weights = {name: size for name, size in sizes.items() if WEIGHTS_NAME.fullmatch(name)}
        self._optimizer_files = {name: size for name, size in sizes.items() if OPTIMIZER_NAME.fullmatch(name)}
        if CONFIG_NAME not in sizes:
            raise CheckpointError(f"{self.path} has no {CONFIG_NAME}: give the directory that save_pretrained wrote")
        self._folder = HeldFolder()
        self.metadata = self._folder.path
        try:
            for name, size in sizes.items():
                if name not in self._weights and name not in self._optimizer_files:
                    content = bytearray(size)
                    self.read_into(name, 0, memoryview(content))
                    self._folder.write(name, content)
        except ResourceError:
            self.close()
            raise

    def weights(self) -> Mapping[str, int]:
        return self._weights

    def optimizer_files(self) -> Mapping[str, int]:
        return self._optimizer_files

    def read_into(self, name: str, begin: int, out: memoryview, seen: Seen | None = None) -> None:
        for at in range(0, len(out), RANGE_BYTES):
            part = out[at : at + RANGE_BYTES]
            self._again(partial(_Connection.read, name=name, begin=begin + at, out=part))
            if seen is not None:  # only now: after a broken connection the part is read again
                seen(part)

    def close(self) -> None:
        """Closes the connection, ends running reads, and removes the folder. Later reads raise Unavailable."""
        self._closed.set()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
        self._folder.remove()

    def _again(self, call: Callable[["_Connection"], ResultT]) -> ResultT:
        """Returns the call's result; retries over a new connection if one fails, and waits for a busy source."""
        broken: _Connection | None = None
        attempts, busy_until_s = 0, time.monotonic() + BUSY_TIMEOUT_S
        while True:
            connection: _Connection | None = None
            try:
                connection = self._connected(broken)
                return call(connection)
            except Exhausted:
                if self._closed.is_set() or time.monotonic() >= busy_until_s:
                    raise
                broken = None
                self._closed.wait(PAUSE_S * random.uniform(0.5, 1.5))  # jitter: not all readers at once
            except _PASSING:
                attempts += 1
                if self._closed.is_set() or attempts == ATTEMPTS:
                    raise
                broken = connection
                self._closed.wait(PAUSE_S * attempts)

    def _connected(self, broken: "_Connection | None") -> "_Connection":
        with self._lock:
            if self._closed.is_set():
                raise Unavailable(f"{self.path}: the connection was closed")
            if self._connection is not None and self._connection is broken:
                self._connection.close()
                self._connection = None
            if self._connection is None:
                self._connection = _Connection(self._locate(), self._credentials)
            return self._connection


class _Connection:
    """To one incarnation of the source."""

    def __init__(self, source: SourceAddress, credentials: ClusterCredentials | None) -> None:
        self._source = source
        self._channel = open_channel(source.address, credentials)
        self._stub = CheckpointServiceStub(self._channel)
        if not is_connected_within(self._channel, CONNECT_TIMEOUT_S):
            self._channel.close()
            raise Unavailable(f"{source.address}: no connection within {CONNECT_TIMEOUT_S:g} s")

    def close(self) -> None:
        self._channel.close()

    def files(self) -> checkpoint_pb2.CheckpointFilesReply:
        request = checkpoint_pb2.CheckpointFilesRequest(id=self._source.id)
        try:
            return self._stub.Files(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, self._source.address) from exc
        except ValueError as exc:  # the channel was closed
            raise Unavailable(f"{self._source.address}: {exc}") from exc

    def read(self, name: str, begin: int, out: memoryview) -> None:
        """Fills out with the file's bytes. Raises InvalidMessage for chunks that do not match the request."""
        request = checkpoint_pb2.CheckpointReadRequest(id=self._source.id, name=name, begin=begin, num_bytes=len(out))
        try:
            call = self._stub.Read(request, timeout=CALL_TIMEOUT_S)
        except ValueError as exc:  # the channel was closed
            raise Unavailable(f"{self._source.address}: {exc}") from exc
        try:
            filled = _fill(out, begin, name, call)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, self._source.address) from exc
        finally:
            call.cancel()
        if filled != len(out):
            raise InvalidMessage("content", f"{filled} bytes of {name}, {len(out)} were asked for")


def _fill(out: memoryview, begin: int, name: str, chunks: Iterable[checkpoint_pb2.CheckpointChunk]) -> int:
    """Copies chunks, which must arrive in order, into out. Returns the number of bytes received."""
    filled = 0
    for chunk in chunks:
        if chunk.begin != begin + filled:
            raise InvalidMessage("begin", f"{chunk.begin} of {name}, not {begin + filled}")
        if not chunk.content or len(chunk.content) > len(out) - filled:
            raise InvalidMessage("content", f"{len(chunk.content)} bytes of {name}, {len(out) - filled} are left")
        if zlib.crc32(chunk.content) != chunk.crc32:
            raise InvalidMessage("crc32", f"the checksum of {name} at {chunk.begin} is wrong")
        out[filled : filled + len(chunk.content)] = chunk.content
        filled += len(chunk.content)
    return filled


def _checked_sizes(reply: checkpoint_pb2.CheckpointFilesReply) -> dict[str, int]:
    """Returns file name -> bytes. Raises InvalidMessage for a name that is no model file's, and above the limits."""
    if len(reply.files) > MAX_FILES:
        raise InvalidMessage("files", f"{len(reply.files)}, at most {MAX_FILES}")
    sizes = {file.name: file.size_bytes for file in reply.files}
    tensors = {name for name in sizes if WEIGHTS_NAME.fullmatch(name) or OPTIMIZER_NAME.fullmatch(name)}
    for name in sizes:
        if not (name in tensors or METADATA_NAME.fullmatch(name) or name == TRAINING_STATE):
            raise InvalidMessage("files", f"{name[:80]!r} is no name of a model's file")
    metadata = [size for name, size in sizes.items() if name not in tensors]
    if max(metadata, default=0) > MAX_METADATA_BYTES or sum(metadata) > MAX_ALL_METADATA_BYTES:
        raise InvalidMessage("files", f"{sum(metadata)} bytes beside the weights, at most {MAX_ALL_METADATA_BYTES}")
    return sizes

"""What a user imports to reach a cluster.

with Client("127.0.0.1:50051") as client:
    for piece in client.generate("def main(", max_new_tokens=64):
        print(piece, end="", flush=True)
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import grpc
import torch

from moecluster.errors import Unavailable
from moecluster.generations import GenerationPiece, GenerationRequest, SamplingParameters
from moecluster.proto import router_pb2
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc import codec
from moecluster.rpc.router_messages import decode_piece, decode_router_status, encode_generation_request
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import ExpertId, RouterStatus

STATUS_TIMEOUT_S = 5.0


class Client:
    """A way to one router. Thread-safe."""

    def __init__(
        self, address: str, *, timeout_s: float = 600.0, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        """address: host:port of a router. timeout_s: longest whole generation."""
        self._address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address, credentials)
        self._stub = RouterServiceStub(self._channel)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> "GenerationStream":
        """Begins a text; iterate over the result for its pieces. temperature 0 is greedy; top_p and top_k 0 are off."""
        request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=SamplingParameters(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        )
        return GenerationStream(self._stub, request, timeout_s=self._timeout_s, address=self._address)

    def moe(self, layer: int, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(y_TD, ids_TK, weights_TK): gates and dispatches raw hidden states of one layer. Raises a MoeClusterError."""
        request = router_pb2.MoeRequest(layer=layer, x=codec.encode_tensor(x_TD.cpu()), timeout_s=self._timeout_s)
        try:
            reply = self._stub.Moe(request, timeout=self._timeout_s)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"router at {self._address}") from exc
        return (
            codec.decode_tensor(reply.y, "y", dtypes=(x_TD.dtype,), shape=(len(x_TD), None)),
            codec.decode_tensor(reply.ids, "ids", dtypes=(torch.int64,), shape=(len(x_TD), None)),
            codec.decode_tensor(reply.weights, "weights", dtypes=(torch.float32,), shape=(len(x_TD), None)),
        )

    def status(self) -> RouterStatus:
        """What the router says of itself. Raises a MoeClusterError, Unavailable if nobody answers."""
        try:
            return decode_router_status(self._stub.Status(router_pb2.RouterStatusRequest(), timeout=STATUS_TIMEOUT_S))
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"router at {self._address}") from exc

    def close(self) -> None:
        """Ends the connection, and generations that still run over it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GenerationStream:
    """The pieces of one text, as an iterator of str. What it was about stands in its fields once it has ended."""

    def __init__(self, stub: RouterServiceStub, request: GenerationRequest, *, timeout_s: float, address: str) -> None:
        self.request = request
        self.ids: list[int] = []  # generated so far
        self.finish_reason = ""  # stop | length | cancelled
        self.prompt_tokens = 0
        self.experts: Mapping[ExpertId, int] = {}  # assignments of prompt and continuation
        self._address = address
        self._call = stub.Generate(encode_generation_request(request), timeout=timeout_s)

    def __iter__(self) -> Iterator[str]:
        """Raises a MoeClusterError: InvalidMessage, Exhausted, Unavailable, DeadlineExceeded, ..."""
        try:
            for message in self._call:
                piece = decode_piece(message)
                self._note(piece)
                if piece.text:
                    yield piece.text
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"router at {self._address}") from exc
        finally:
            self.cancel()

    def text(self) -> str:
        """The whole text that is still to come. Raises what iterating raises."""
        return "".join(self)

    def cancel(self) -> None:
        """Ends the generation; fine once it has ended."""
        self._call.cancel()

    def _note(self, piece: GenerationPiece) -> None:
        self.ids += piece.ids
        if piece.finish_reason:
            self.finish_reason, self.prompt_tokens = piece.finish_reason, piece.prompt_tokens
            self.experts = piece.experts


class FailoverStream:
    """The pieces of one text, from the first of several routers that serves.

    If that one is lost meanwhile, the next one writes the text again, and the pieces go on where they broke off: greedy
    or drawn by a seed, a text can be had again.
    """

    def __init__(
        self,
        addresses: Iterable[str],
        prompt: str,
        *,
        timeout_s: float = 600.0,
        credentials: grpc.ChannelCredentials | None = None,
        **settings: Any,
    ) -> None:
        """addresses: of routers of one cluster, asked for as they are needed. settings: as of Client.generate."""
        self.stream: GenerationStream | None = None  # the last one that was begun
        self._addresses = addresses
        self._prompt = prompt
        self._timeout_s = timeout_s
        self._credentials = credentials
        self._settings = settings

    def __iter__(self) -> Iterator[str]:
        """Raises what iterating over a GenerationStream raises; Unavailable only when there is no router left.

        Also if another router's text differs from what was seen already (at a near tie of greedy decoding).
        """
        seen, lost = "", Unavailable("there is no router to ask")
        for address in self._addresses:
            with Client(address, timeout_s=self._timeout_s, credentials=self._credentials) as client:
                self.stream = client.generate(self._prompt, **self._settings)
                text = ""
                try:
                    for piece in self.stream:
                        text += piece
                        if not (text.startswith(seen) or seen.startswith(text)):
                            raise Unavailable(f"the text broke off, and the router at {address} writes another: {lost}")
                        if len(text) > len(seen):
                            yield text[len(seen) :]
                            seen = text
                    if text != seen:
                        raise Unavailable(f"the text broke off, and the router at {address} ends it earlier: {lost}")
                    return
                except Unavailable as exc:
                    lost = exc
        raise lost

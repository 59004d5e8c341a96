"""The blocking client."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc
import torch

from moecluster.client.cluster_client import STATUS_TIMEOUT_S, CancelAnswers, ClusterClient
from moecluster.client.failover import Route
from moecluster.client.requests import GenerationOptions, build_request
from moecluster.client.stream_state import StreamState
from moecluster.errors import Unavailable
from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.proto import router_pb2
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.layer_messages import decode_moe_reply, encode_moe_request
from moecluster.rpc.router.messages import decode_router_status
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import RouterStatus

AnswerT = TypeVar("AnswerT")
Discover = Callable[[], Iterable[str]]


class Client(ClusterClient[grpc.Channel, Discover]):
    """Client of one cluster's routers. Thread-safe."""

    def generate(
        self,
        prompt: str = "",
        *,
        prompt_ids: Sequence[int] = (),
        messages: Sequence[Mapping[str, str]] = (),
        **options: Unpack[GenerationOptions],
    ) -> "GenerationStream":
        """Starts a generation from one of: a prompt, its token ids, a conversation. Iterate over the result for chunks.

        Raises InvalidMessage for an invalid request; iterating raises all other errors.
        """
        request = build_request(prompt, prompt_ids, messages, **options)
        return GenerationStream(request, self._route_of_generation(), self._stub, self._find_routers)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[GenerationOptions]) -> "GenerationStream":
        """Starts the reply to a conversation of {"role", "content"}, by the checkpoint's chat template."""
        return self.generate(messages=messages, **options)

    def cancel(self, request_id: str) -> bool:
        """Cancels a request at whichever router runs it. Returns False if none knows it. Raises Unavailable if no
        router answers."""
        request, answers = router_pb2.CancelRequest(request_id=request_id), CancelAnswers()
        for address in self._routers.addresses:
            with answers.asking(address):
                answers.add(self._stub(address).Cancel(request, timeout=STATUS_TIMEOUT_S).found)
        return answers.found()

    def moe(self, layer: int, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gates and dispatches raw hidden states of one MoE layer. Returns (y_TD, ids_TK, weights_TK).

        Raises a MoeClusterError.
        """
        request = encode_moe_request(layer, x_TD, self._timeout_s)
        return decode_moe_reply(self._ask(lambda stub: stub.Moe(request, timeout=self._timeout_s)), x_TD)

    def status(self) -> RouterStatus:
        """Returns the status of the first router that answers. Raises Unavailable if none does."""
        request = router_pb2.RouterStatusRequest()
        return decode_router_status(self._ask(lambda stub: stub.Status(request, timeout=STATUS_TIMEOUT_S)))

    def close(self) -> None:
        """Closes the connections and ends the requests on them."""
        for channel in self._channels.close():
            channel.close()

    def _ask(self, call: Callable[[RouterServiceStub], AnswerT]) -> AnswerT:
        """Returns the reply of the first router that answers."""
        route = self._route_of_call()
        while True:
            address = _next_address(route, self._find_routers)
            try:
                return call(self._stub(address))
            except grpc.RpcError as exc:
                route.failed(from_rpc_error(exc, f"router at {address}"), generated=False)

    def _open(self, address: str, credentials: ClusterCredentials | None) -> grpc.Channel:
        return open_channel(address, credentials)

    def _stub(self, address: str) -> RouterServiceStub:
        return RouterServiceStub(self._channels.to(address))

    def _find_routers(self) -> tuple[str, ...]:
        """Returns the routers' current addresses; connections to all others close with their last call."""
        assert self._discover is not None
        found = tuple(self._discover())
        self._channels.keep(found)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Call(Protocol):
    """A running Generate."""

    def __iter__(self) -> Iterator[router_pb2.GenerateReply]: ...
    def cancel(self) -> bool: ...


class GenerationStream(StreamState):
    """The chunks of one request, as an iterator. Its fields hold what has arrived so far."""

    def __init__(
        self,
        request: GenerationRequest,
        route: Route,
        stub_of: Callable[[str], RouterServiceStub],
        find_routers: Discover,
    ) -> None:
        super().__init__(request, route)
        self._stub_of = stub_of
        self._find_routers = find_routers
        first = route.next()
        self._call: _Call | None = self._begin(first) if first else None

    def __iter__(self) -> Iterator[GenerationChunk]:
        """Raises a MoeClusterError: InvalidMessage, Exhausted, Unavailable, DeadlineExceeded, ...

        Unavailable and Exhausted only if no router is left to continue at.
        """
        try:
            if self._call is None:
                self._begin_next()
            while not self.finish_reason:
                try:
                    assert self._call is not None
                    for message in self._call:
                        yield self._note(message)
                    self._check_finished()
                except (grpc.RpcError, Unavailable) as exc:
                    if self._goes_on_after(exc):
                        self._begin_next()
        finally:
            self.cancel()

    def text(self) -> str:
        """Returns all of the text that is still to come. Raises what iterating raises."""
        return "".join(chunk.text for chunk in self)

    def cancel(self) -> None:
        """Cancels the request. Does nothing once it has ended."""
        self._left = True
        if self._call is not None:
            self._call.cancel()

    def _begin(self, address: str) -> _Call:
        return self._stub_of(address).Generate(self._next_message(address), timeout=self._route.left_s)

    def _begin_next(self) -> None:
        """Continues at the next router. Raises the reason if there is none."""
        self._call = self._begin(_next_address(self._route, self._find_routers))
        if self._left:  # from another thread, meanwhile
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


def _next_address(route: Route, find_routers: Discover) -> str:
    while (address := route.next()) is None:
        if route.wants_discovery():
            route.discovered(find_routers())
        else:
            time.sleep(route.pause_s())
    return address

"""A request's state at its reader, and its failover when a router is lost. Does no I/O: the streams do that."""

from collections.abc import Mapping

import grpc

from moecluster.client.failover import Route
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.generation import GenerationChunk, GenerationRequest, TokenLogprob
from moecluster.proto import router_pb2
from moecluster.rpc.router.messages import decode_chunk, encode_generation_request
from moecluster.rpc.router.resume import ResumableRequest
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import ExpertId


class StreamState:
    """Fields of a request, updated as chunks arrive; some are set only by the last chunk."""

    def __init__(self, request: GenerationRequest, route: Route) -> None:
        self.address = ""  # of the router that was asked last
        self.logprobs: list[TokenLogprob] = []  # of the ids, if requested
        self.finish_reason = ""  # stop | length | cancelled
        self.prompt_tokens = 0
        self.cached_tokens = 0  # of the prompt, that needed no computing
        self.weight_version = 0  # that generated the last chunk
        self.experts: Mapping[ExpertId, int] = {}  # assignments of prompt and generated tokens at the last router
        self._received = ResumableRequest(request)
        self._route = route
        self._left = False  # the reader has left

    @property
    def request(self) -> GenerationRequest:
        """The request as it was last sent; its request_id is the one for cancel."""
        return self._received.request

    @property
    def ids(self) -> list[int]:
        """Token ids generated so far."""
        return self._received.ids

    def _next_message(self, address: str) -> router_pb2.GenerateRequest:
        """Returns the message for the router at this address."""
        self.address = address
        if self._route.any_version:
            self._received.give_up_version()
        return encode_generation_request(self._received.next_request())

    def _note(self, message: router_pb2.GenerateReply) -> GenerationChunk:
        chunk = decode_chunk(message)
        self._received.take(chunk)
        self.logprobs += chunk.logprobs
        self.weight_version = chunk.weight_version
        if chunk.finish_reason:
            self.finish_reason, self.prompt_tokens = chunk.finish_reason, chunk.prompt_tokens
            self.cached_tokens, self.experts = chunk.cached_tokens, chunk.experts
        return chunk

    def _check_finished(self) -> None:
        """Raises Unavailable for a stream that ended without the last chunk."""
        if not self.finish_reason:
            raise Unavailable(f"router at {self.address}: the stream ended without a finish reason")

    def _goes_on_after(self, error: grpc.RpcError | MoeClusterError) -> bool:
        """Returns whether to continue at another router; False if the reader has left.

        Raises an error that another router would not fix.
        """
        if self._left:
            self.finish_reason = "cancelled"
            return False
        if isinstance(error, grpc.RpcError):
            error = from_rpc_error(error, f"router at {self.address}")
        self._route.failed(error, generated=self._received.grew)
        return True

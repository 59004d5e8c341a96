"""A text as its reader sees it, and what becomes of it when a router is lost. Does no I/O: the streams do that."""

from collections.abc import Mapping

import grpc

from moecluster.client.failover import Route
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.generation import GenerationPiece, GenerationRequest, TokenLogprob
from moecluster.proto import router_pb2
from moecluster.rpc.router.messages import decode_piece, encode_generation_request
from moecluster.rpc.router.resume import ReceivedText
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import ExpertId


class WrittenText:
    """A text's fields, filled as its pieces come; those of the last piece stand when it has ended."""

    def __init__(self, request: GenerationRequest, route: Route) -> None:
        self.address = ""  # of the router that was asked last
        self.logprobs: list[TokenLogprob] = []  # of the ids, if they were asked for
        self.finish_reason = ""  # stop | length | cancelled
        self.prompt_tokens = 0
        self.cached_tokens = 0  # of the prompt, that needed no computing
        self.weight_version = 0  # that wrote what came last
        self.experts: Mapping[ExpertId, int] = {}  # assignments of prompt and continuation at the last router
        self._received = ReceivedText(request)
        self._route = route
        self._left = False  # nobody reads on

    @property
    def request(self) -> GenerationRequest:
        """As it was sent last; its request_id names the text for cancel."""
        return self._received.request

    @property
    def ids(self) -> list[int]:
        """Generated so far."""
        return self._received.ids

    def _next_message(self, address: str) -> router_pb2.GenerateRequest:
        """What to ask the router at this address."""
        self.address = address
        if self._route.any_version:
            self._received.give_up_version()
        return encode_generation_request(self._received.next_request())

    def _note(self, message: router_pb2.GenerateReply) -> GenerationPiece:
        piece = decode_piece(message)
        self._received.take(piece)
        self.logprobs += piece.logprobs
        self.weight_version = piece.weight_version
        if piece.finish_reason:
            self.finish_reason, self.prompt_tokens = piece.finish_reason, piece.prompt_tokens
            self.cached_tokens, self.experts = piece.cached_tokens, piece.experts
        return piece

    def _check_finished(self) -> None:
        """Raises Unavailable for a stream that ended without the last piece."""
        if not self.finish_reason:
            raise Unavailable(f"router at {self.address}: the text ended without saying why")

    def _goes_on_after(self, error: grpc.RpcError | MoeClusterError) -> bool:
        """Whether to ask another router now; False if the text was left. Raises an error that none would mend."""
        if self._left:
            self.finish_reason = "cancelled"
            return False
        if isinstance(error, grpc.RpcError):
            error = from_rpc_error(error, f"router at {self.address}")
        self._route.failed(error, wrote=self._received.grew)
        return True

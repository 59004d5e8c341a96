"""What has come of one text so far, from whichever router wrote it."""

import dataclasses
import logging
from collections.abc import Mapping

from moecluster.errors import Unavailable
from moecluster.generations import GenerationPiece, GenerationRequest, TokenLogprob
from moecluster.proto import router_pb2
from moecluster.rpc.router_messages import decode_piece, encode_generation_request
from moecluster.types import ExpertId

logger = logging.getLogger(__name__)


class WrittenText:
    """A text's fields, filled as its pieces come; those of the last piece stand when it has ended."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request  # as it was sent last; its request_id names the text for cancel
        self.address = ""  # of the router that was asked last
        self.ids: list[int] = []  # generated so far
        self.logprobs: list[TokenLogprob] = []  # of these ids, if they were asked for
        self.finish_reason = ""  # stop | length | cancelled
        self.prompt_tokens = 0
        self.cached_tokens = 0  # of the prompt, that needed no computing
        self.weight_version = 0  # that wrote what came last
        self.experts: Mapping[ExpertId, int] = {}  # assignments of prompt and continuation at the last router
        self._asked_for = request
        self._attempts = 0

    def _next_message(self, address: str, *, any_version: bool) -> router_pb2.GenerateRequest:
        """What to ask the next router: the same, to go on behind what was received.

        any_version: with whatever weights are served, because no router holds those of the text any more.
        """
        # A name of its own: a router that lost us may not have ended the earlier attempt yet.
        name = self._asked_for.request_id + (f"-{self._attempts}" if self._attempts else "")
        self._attempts += 1
        self.address = address
        version = self.weight_version if self.ids else 0
        if any_version and version:
            logger.warning(
                "no router holds weight version %d any more: a text goes on behind %d tokens with what is served",
                version,
                len(self.ids),
            )
        self.request = dataclasses.replace(
            self._asked_for,
            request_id=name,
            generated_ids=tuple(self.ids),
            weight_version=0 if any_version else version,
        )
        return encode_generation_request(self.request)

    def _note(self, message: router_pb2.GenerateReply) -> GenerationPiece:
        piece = decode_piece(message)
        self.ids += piece.ids
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

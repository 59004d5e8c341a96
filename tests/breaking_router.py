"""A RouterService over real loopback gRPC that writes one text, a byte a token, and can break off anywhere in it."""

import codecs
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moecluster.errors import Exhausted, InvalidMessage, StaleOrder, Unavailable
from moecluster.generations import GenerationPiece, GenerationRequest, TokenLogprob
from moecluster.rpc.router_server import serve_router
from moecluster.types import ExpertId, RouterStatus

PROMPT_TOKENS = 7


class BreakingRouter:
    """Goes on behind generated_ids as the contract wants it: with the detokenising state that they lead to."""

    def __init__(
        self,
        text: str,
        *,
        lost_after: int | None = None,
        silent_end: bool = False,
        full: Exhausted | None = None,
        hold_after: int | None = None,
        version: int = 0,
        held: tuple[int, ...] = (),
    ) -> None:
        """lost_after: breaks off when so many ids of the text were written; the last piece is of its own.

        silent_end: leaves out the last piece. full: what it says to everybody. hold_after: waits there until cancelled.
        version: of the weights that it serves. held: others that it can go on with.
        """
        self.requests: list[GenerationRequest] = []
        self.cancelled = threading.Event()
        self._ids = text.encode()
        self._lost_after = lost_after
        self._silent_end = silent_end
        self._full = full
        self._hold_after = hold_after
        self._version = version
        self._held = held

    def generate(self, request: GenerationRequest) -> Iterator[GenerationPiece]:
        self.requests.append(request)
        if self._full is not None:
            raise self._full
        if request.weight_version not in (0, self._version, *self._held):
            raise StaleOrder(f"weight version {request.weight_version} is not held here: {self._version} is served")
        if request.prompt == "wrong":
            raise InvalidMessage("prompt: it is wrong")
        return self._pieces(request)

    def _pieces(self, request: GenerationRequest) -> Iterator[GenerationPiece]:
        done = len(request.generated_ids)
        assert bytes(request.generated_ids) == self._ids[:done]
        version = request.weight_version or self._version
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(self._ids[:done])
        for position in range(done, len(self._ids)):
            if self._lost_after is not None and position >= self._lost_after:
                raise Unavailable("the connection is lost")
            if self._hold_after is not None and position >= self._hold_after:
                assert self.cancelled.wait(30.0)
                yield GenerationPiece(finish_reason="cancelled")
                return
            token = self._ids[position]
            logprob = TokenLogprob(id=token, logprob=-float(position), token=bytes([token]))
            yield GenerationPiece(
                ids=(token,),
                text=decoder.decode(bytes([token])),
                logprobs=(logprob,) if request.logprobs else (),
                weight_version=version,
            )
        if self._lost_after is not None:
            raise Unavailable("the connection is lost")
        if not self._silent_end:
            yield GenerationPiece(
                text=decoder.decode(b"", True),
                finish_reason="length",
                prompt_tokens=PROMPT_TOKENS,
                weight_version=version,
                experts={ExpertId(layer=0, index=1): 5},
            )

    def cancel(self, request_id: str) -> bool:
        known = any(request.request_id == request_id for request in self.requests)
        if known:
            self.cancelled.set()
        return known

    def moe(self, layer: int, x_TD: torch.Tensor, timeout_s: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise InvalidMessage("layer: it has none")

    def status(self) -> RouterStatus:
        return RouterStatus(router="breaking", model="", placement=(0, 0), running=0, rss_bytes=0)


@contextmanager
def serving_routers(*routers: BreakingRouter) -> Iterator[list[str]]:
    """Their addresses, while they serve."""
    servers = [serve_router(router) for router in routers]
    try:
        yield [server.address for server in servers]
    finally:
        for router in routers:
            router.cancelled.set()
        for server in servers:
            server.stop(0.0)

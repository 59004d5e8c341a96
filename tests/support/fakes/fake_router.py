"""A router over real gRPC that generates from a script, continues after generated_ids as the contract requires, and on
request breaks off, refuses or waits.
"""

import codecs
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from moecluster.addresses import ListenAddress, split_host_port
from moecluster.errors import ContextLengthExceeded, Exhausted, InvalidMessage, MoeClusterError, StaleRequest
from moecluster.generation import GenerationChunk, GenerationRequest, TokenLogprob
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.server import serve_router
from moecluster.types import PlacementNumber, RouterStatus

WORDS = ("the", "red", "fox", "swam", "über", "grey", "ice", "and", "sang", "low", "notes", "till", "dawn")
MAX_TOKENS = 4096
LONGEST = 24  # words of a request without a limit


@dataclass(frozen=True, kw_only=True)
class FakeToken:
    """One token, and the text that it adds."""

    text: str
    logprob: TokenLogprob


Script = Callable[[GenerationRequest], Sequence[FakeToken]]  # all tokens of a request


def word_ids(request: GenerationRequest) -> list[int]:
    """Returns all token ids of a request."""
    prompt = request.prompt or request.messages_json or ",".join(map(str, request.prompt_ids))
    start = zlib.crc32(f"{prompt}|{request.sampling.seed}".encode())
    return [(start + i) % len(WORDS) for i in range(request.max_new_tokens or LONGEST)]


def words(ids: list[int]) -> str:
    return "".join(f" {WORDS[i]}" for i in ids)


def write_words(request: GenerationRequest) -> list[FakeToken]:
    """Generates words: token i has id (start + i) % len(WORDS), with start from prompt and seed."""

    def logprob(i: int) -> TokenLogprob:
        alternatives = [(i + k) % len(WORDS) for k in range(request.top_logprobs)]
        top = tuple(_word(other, -0.5 - k) for k, other in enumerate(alternatives))
        return replace(_word(i, -0.5), top=top)

    return [FakeToken(text=words([i]), logprob=logprob(i)) for i in word_ids(request)]


def write_bytes(text: str) -> Script:
    """Returns a script that always generates this text, one byte per token; a character comes with its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    tokens = [
        FakeToken(
            text=decoder.decode(bytes([byte])),
            logprob=TokenLogprob(id=byte, logprob=-float(position), token=bytes([byte])),
        )
        for position, byte in enumerate(text.encode())
    ]
    return lambda request: tokens


class FakeRouter:
    """A RouterHandler and its server. Tests may change its fields while it serves."""

    def __init__(
        self,
        name: str = "router",
        *,
        port: int = 0,
        script: Script = write_words,
        credentials: ClusterCredentials | None = None,
    ) -> None:
        self.name = name
        self.script = script
        self._credentials = credentials
        self.pace_s = 0.0  # between tokens
        self.error: MoeClusterError | None = None  # raised by generate()
        self.break_after: int | None = None  # tokens of one request, then `breaking`, once
        self.breaking: MoeClusterError | None = None  # None: the last chunk says cancelled
        self.silent_end = False  # leaves out the last chunk
        self.max_running = 64
        self.hold = threading.Event()  # generation proceeds while it is set,
        self.hold.set()
        self.free_tokens = 0  # or up to this many tokens
        self.versions: tuple[int, ...] = (1,)  # weight versions: all are held, the first is served
        self.requests: list[GenerationRequest] = []
        self.running: dict[str, threading.Event] = {}
        self.controller = ""
        self.reloaded = ""  # the directory of the last request to reload
        self.server = serve_router(self, listen=ListenAddress(port=port), credentials=self._credentials)
        self.address = self.server.address

    def generate(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        if self.error is not None:
            raise self.error
        if request.weight_version not in (0, *self.versions):
            raise StaleRequest(
                f"weight version {request.weight_version} is not held here: {self.versions[0]} is served"
            )
        if len(self.running) >= self.max_running:
            raise Exhausted(f"{self.max_running} requests run already", retry_after_s=1.4)
        prompt_tokens = len(request.prompt_ids) or len((request.prompt or request.messages_json).split())
        if prompt_tokens + request.max_new_tokens > MAX_TOKENS:
            raise ContextLengthExceeded(
                "prompt",
                f"its {prompt_tokens} tokens and max_new_tokens = {request.max_new_tokens} "
                f"exceed the model's {MAX_TOKENS}",
            )
        self.requests.append(request)
        self.running[request.request_id] = threading.Event()
        return self._write(request, prompt_tokens)

    def _write(self, request: GenerationRequest, prompt_tokens: int) -> Iterator[GenerationChunk]:
        cancelled, tokens = self.running[request.request_id], self.script(request)
        done, version = len(request.generated_ids), request.weight_version or self.versions[0]
        assert list(request.generated_ids) == [token.logprob.id for token in tokens[:done]], "another text was begun"
        text, finish = "".join(token.text for token in tokens[:done]), "length"
        if any(stop in text for stop in request.stop):
            tokens, finish = tokens[:done], "stop"  # the earlier router was lost before its last chunk
        try:
            for written, token in enumerate(tokens[done:]):
                if self.break_after == written:
                    self.break_after = None
                    if self.breaking is not None:
                        raise self.breaking
                    finish = "cancelled"
                    break
                while not cancelled.wait(self.pace_s) and written >= self.free_tokens and not self.hold.is_set():
                    time.sleep(0.01)
                if cancelled.is_set():
                    finish = "cancelled"
                    break
                chunk = token.text
                text += chunk
                stop = next((stop for stop in request.stop if stop in text), None)
                if stop is not None:
                    before = text[: text.index(stop)]
                    chunk = before[len(text) - len(chunk) :]
                logprobs = (token.logprob,) if request.logprobs else ()
                yield GenerationChunk(ids=(token.logprob.id,), text=chunk, logprobs=logprobs, weight_version=version)
                if stop is not None:
                    finish = "stop"
                    break
            if self.break_after == len(tokens) - done and self.breaking is not None:
                self.break_after = None
                raise self.breaking
            if not self.silent_end:
                yield GenerationChunk(finish_reason=finish, prompt_tokens=prompt_tokens, weight_version=version)
        finally:
            self.running.pop(request.request_id, None)

    def cancel(self, request_id: str) -> bool:
        event = self.running.get(request_id)
        if event is not None:
            event.set()
        return event is not None

    def moe(self, layer: int, x_TD: torch.Tensor, timeout_s: float) -> Any:
        raise InvalidMessage("layer", "it has none")

    def status(self) -> RouterStatus:
        return RouterStatus(
            router=self.name, model="words", placement=PlacementNumber(1, 1), running=len(self.running), rss_bytes=1,
            max_tokens=MAX_TOKENS, controller=self.controller,
        )  # fmt: skip

    def reload(self, model_dir: str) -> None:
        self.reloaded = model_dir

    def kill(self) -> None:
        """Stops the server at once, as a crash does."""
        self.server.stop(0.0)

    def revive(self) -> None:
        """Serves again at the same address, as a new process would."""
        listen = ListenAddress(port=split_host_port(self.address)[1])
        self.server = serve_router(self, listen=listen, credentials=self._credentials)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        for event in list(self.running.values()):
            event.set()
        self.server.stop(0.0)


@contextmanager
def serving(*routers: FakeRouter) -> Iterator[list[str]]:
    """Context: the routers serve; yields their addresses."""
    with ExitStack() as stack:
        yield [stack.enter_context(router).address for router in routers]


def _word(i: int, logprob: float) -> TokenLogprob:
    return TokenLogprob(id=i, logprob=logprob, token=words([i]).encode())

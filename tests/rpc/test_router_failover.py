"""One text from several routers: from the first that serves, and whole although routers are lost meanwhile."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from moecluster.client import Client, FailoverStream
from moecluster.errors import InvalidMessage, Unavailable
from moecluster.generations import GenerationPiece, GenerationRequest
from moecluster.rpc.router_server import serve_router
from moecluster.types import RouterStatus
from tests.loopback_cluster import LoopbackCluster
from tests.twin_actors import save_tiny_model

PROMPT = "def add(a, b):"
NOBODY = "127.0.0.1:1"
SETTINGS: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackCluster]:
    with LoopbackCluster(save_tiny_model(tmp_path_factory.mktemp("model"))) as running:
        yield running


@pytest.fixture(scope="module")
def expected(cluster: LoopbackCluster) -> str:
    with Client(cluster.router_server.address) as client:
        return client.generate(PROMPT, **SETTINGS).text()


class Writer:
    """A router that writes what it is told to, to the end or until it is lost."""

    def __init__(self, pieces: Sequence[str], *, lost: bool = False) -> None:
        self._pieces = pieces
        self._lost = lost

    def generate(self, request: GenerationRequest) -> Iterator[GenerationPiece]:
        for piece in self._pieces:
            yield GenerationPiece(ids=(1,), text=piece)
        if self._lost:
            raise Unavailable("the connection is lost")
        yield GenerationPiece(finish_reason="length")

    def cancel(self, request_id: str) -> bool:
        return False

    def moe(self, layer: int, x_TD: torch.Tensor, timeout_s: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise InvalidMessage("layer: it has none")

    def status(self) -> RouterStatus:
        return RouterStatus(router="writer", model="", placement=(0, 0), running=0, rss_bytes=0)


def test_a_router_that_is_not_there_is_passed_over_and_no_more_are_asked_than_needed(cluster, expected) -> None:
    def addresses() -> Iterator[str]:
        yield NOBODY
        yield cluster.router_server.address
        pytest.fail("the third address was asked for")

    stream = FailoverStream(addresses(), PROMPT, **SETTINGS)
    assert "".join(stream) == expected
    assert stream.stream is not None and stream.stream.prompt_tokens == len(PROMPT)


def test_a_text_goes_on_where_a_lost_router_broke_it_off(cluster, expected) -> None:
    first = serve_router(cluster.router)
    pieces = iter(FailoverStream([first.address, NOBODY, cluster.router_server.address], PROMPT, **SETTINGS))
    begun = [next(pieces) for _ in range(5)]
    first.stop(0.0)
    assert "".join([*begun, *pieces]) == expected
    assert "".join(begun) != expected


def test_no_router_that_serves_is_said(cluster) -> None:
    with pytest.raises(Unavailable, match="no router to ask"):
        list(FailoverStream([], PROMPT, **SETTINGS))
    with pytest.raises(Unavailable, match=f"router at {NOBODY}|failed to connect"):
        list(FailoverStream([NOBODY], PROMPT, **SETTINGS))


@pytest.mark.parametrize(
    ("other", "complaint"),
    [(["a", "b", "X", "d"], "writes another"), (["a", "b"], "ends it earlier"), (["ab", "X"], "writes another")],
)
def test_two_texts_are_never_pieced_together(other: list[str], complaint: str) -> None:
    first, second = serve_router(Writer(["a", "b", "c"], lost=True)), serve_router(Writer(other))
    seen = []
    try:
        with pytest.raises(Unavailable, match=f"{complaint}.*the connection is lost"):
            for piece in FailoverStream([first.address, second.address], PROMPT, max_new_tokens=4):
                seen.append(piece)
        assert seen == ["a", "b", "c"]
    finally:
        first.stop(0.0)
        second.stop(0.0)


def test_a_wrong_request_is_not_carried_from_router_to_router(cluster) -> None:
    def addresses() -> Iterator[str]:
        yield cluster.router_server.address
        pytest.fail("another router would refuse it as well")

    with pytest.raises(InvalidMessage, match="exceed the model's 256"):
        list(FailoverStream(addresses(), "x" * 300, **SETTINGS))

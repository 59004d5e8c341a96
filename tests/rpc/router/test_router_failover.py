"""One request over several routers: served by the first available one, and complete although routers are lost."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from moecluster.client import AsyncClient, Client
from moecluster.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    Exhausted,
    InvalidMessage,
    MoeClusterError,
    Unavailable,
)
from moecluster.generation import GenerationRequest
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.fakes.fake_router import FakeRouter, FakeToken, serving, write_bytes

PROMPT = "def add(a, b):"
NOBODY = "127.0.0.1:1"
SETTINGS: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0.9, "seed": 3}
TEXT = "naïve €5 \N{GRINNING FACE}!"  # of characters of one to four tokens
NUM_IDS = len(TEXT.encode())
LOST = Unavailable("the connection is lost")


@pytest.fixture(scope="module")
def expected(cluster: LoopbackCluster) -> str:
    with Client(cluster.router_server.address) as client:
        return client.generate(PROMPT, **SETTINGS).text()


def writing(
    *,
    lost_after: int | None = None,
    free_tokens: int | None = None,
    silent_end: bool = False,
    error: MoeClusterError | None = None,
    versions: tuple[int, ...] = (1,),
) -> FakeRouter:
    """A router that generates TEXT. lost_after: it is lost once the request has this many tokens. free_tokens: it waits
    after this many tokens until cancelled. versions: the weight versions it holds, the served one first."""
    router = FakeRouter(script=write_bytes(TEXT))
    router.versions = versions
    router.breaking, router.silent_end, router.error = LOST, silent_end, error
    if lost_after is not None:
        break_each_time(router, lambda done: max(lost_after - done, 0))
    if free_tokens is not None:
        router.free_tokens = free_tokens
        router.hold.clear()
    return router


def break_each_time(router: FakeRouter, after: Callable[[int], int]) -> None:
    """after: tokens that the request already has -> tokens that the router adds before it is lost."""
    script = router.script

    def write(request: GenerationRequest) -> Sequence[FakeToken]:
        router.break_after = after(len(request.generated_ids))
        return script(request)

    router.script = write


def from_threads(addresses: Any, use: Callable[[Any], Any], **settings: Any) -> Any:
    """The result of `use` on a stream of the synchronous client."""
    with Client(addresses, **settings) as client:
        text = client.generate(PROMPT, max_new_tokens=NUM_IDS, logprobs=True, stop="?")
        return use((text.text(), text))


def from_asyncio(addresses: Any, use: Callable[[Any], Any], **settings: Any) -> Any:
    """The result of `use` on a stream of the asyncio client."""

    async def run() -> Any:
        if "discover" in settings:
            found = settings["discover"]

            async def discover() -> Any:
                return found()

            settings["discover"] = discover
        async with AsyncClient(addresses, **settings) as client:
            text = client.generate(PROMPT, max_new_tokens=NUM_IDS, logprobs=True, stop="?")
            return use((await text.text(), text))

    return asyncio.run(run())


BOTH = pytest.mark.parametrize("write", [from_threads, from_asyncio])


def whole(written: tuple[str, Any]) -> None:
    """Checks that the output is the same as without any loss."""
    text, stream = written
    assert text == TEXT and bytes(stream.ids) == TEXT.encode()
    assert [logprob.logprob for logprob in stream.logprobs] == [-float(i) for i in range(NUM_IDS)]
    assert stream.finish_reason == "length" and stream.prompt_tokens == len(PROMPT.split())


def version_of_whole(written: tuple[str, Any]) -> int:
    """The weight version that generated the end of such a request."""
    whole(written)
    version: int = written[1].weight_version
    return version


@BOTH
def test_a_request_goes_on_behind_the_ids_that_were_received_wherever_it_broke_off(write) -> None:
    for lost_after in range(NUM_IDS + 1):  # the last one: only the chunk with the finish reason is lost
        first, second = writing(lost_after=lost_after), writing()
        with serving(first, second) as addresses:
            write(addresses, whole)
        assert len(first.requests) == 1
        (begun,), (continued,) = first.requests, second.requests
        assert begun.generated_ids == () and bytes(continued.generated_ids) == TEXT.encode()[:lost_after]
        assert (continued.prompt, continued.stop, continued.max_new_tokens) == (PROMPT, ("?",), NUM_IDS)
        assert continued.request_id != begun.request_id and continued.sampling == begun.sampling


@BOTH
def test_a_request_passes_through_as_many_routers_as_are_lost(write) -> None:
    routers = [*(writing(lost_after=i) for i in (2, 4, 9)), writing(silent_end=True)]
    with serving(*routers, writing()) as addresses:
        write(addresses, whole)


@BOTH
def test_a_router_that_has_written_is_asked_again_when_all_others_are_lost(write) -> None:
    router = writing()
    break_each_time(router, lambda done: min(5, NUM_IDS - done))
    with serving(router) as addresses, pytest.raises(Unavailable, match="connection is lost"):
        write([NOBODY, *addresses], whole)  # it never sends the finish reason
    assert len(router.requests) >= NUM_IDS / 5
    names = [request.request_id for request in router.requests]
    assert len(set(names)) == len(names)


@BOTH
def test_where_the_routers_are_now_is_asked_only_when_all_known_ones_are_lost(write) -> None:
    asked = []
    with serving(writing(lost_after=3), writing()) as (first, second):

        def discover() -> list[str]:
            asked.append(time.monotonic())
            return [second]

        write([second], whole, discover=discover)
        assert not asked
        write([first], whole, discover=discover)
        assert len(asked) == 1
        write([], whole, discover=discover)


@BOTH
def test_a_full_router_is_passed_over_and_if_all_are_full_that_is_said_with_the_time_to_wait(write) -> None:
    full = writing(error=Exhausted("too many", retry_after_s=7.5))
    with serving(full, writing()) as (busy, free):
        write([busy, free], whole)
        with pytest.raises(Exhausted, match="too many") as caught:
            write([busy, NOBODY], whole)
        assert caught.value.retry_after_s == 7.5


@BOTH
def test_a_request_goes_on_with_the_weights_that_it_was_begun_with_where_a_router_holds_them(write) -> None:
    first, other = writing(lost_after=4, versions=(1,)), writing(versions=(2,))
    holding = writing(versions=(2, 1))
    with serving(first, other, holding) as addresses:
        assert write(addresses, version_of_whole) == 1
    assert [request.weight_version for router in (first, other, holding) for request in router.requests] == [0, 1]


@BOTH
def test_a_request_goes_on_with_what_is_served_once_no_router_holds_its_weights(write, caplog) -> None:
    first = writing(lost_after=4, versions=(1,))
    second, third = writing(versions=(2,)), writing(versions=(2,))
    second.break_after = third.break_after = 5
    with serving(first, second, third) as addresses:
        assert write(addresses, version_of_whole) == 2
    assert {request.weight_version for request in first.requests} == {0, 1}
    begun = [(len(r.generated_ids), r.weight_version) for r in (*second.requests, *third.requests)]
    assert (4, 0) in begun and (9, 2) in begun
    assert "no router holds weight version 1: a request continues with the served weights after 4 tokens" in caplog.text
    assert "weight version 2:" not in caplog.text


@BOTH
def test_a_router_that_may_hold_the_weights_and_is_full_is_waited_for(write) -> None:
    first, other = writing(lost_after=4, versions=(1,)), writing(versions=(2,))
    full = writing(error=Exhausted("too many", retry_after_s=0.1))
    has_room = threading.Timer(0.5, setattr, (full, "error", None))
    has_room.start()
    with serving(first, other, full) as addresses:
        assert write(addresses, version_of_whole, patience_s=20.0) == 1
    has_room.join()
    first, other = writing(lost_after=4, versions=(1,)), writing(versions=(2,))
    always_full = writing(error=Exhausted("too many", retry_after_s=0.1))
    with serving(first, other, always_full) as addresses:  # when patience is over, started requests continue
        assert write(addresses, version_of_whole, patience_s=0.5) == 2


@BOTH
def test_with_patience_a_request_waits_for_a_router_that_comes_back(write) -> None:
    with writing() as router:
        router.kill()
        timer = threading.Timer(0.5, router.revive)
        timer.start()
        try:
            write([router.address], whole, patience_s=20.0)
        finally:
            timer.join()


@BOTH
def test_no_router_that_serves_is_said(write) -> None:
    with pytest.raises(Unavailable, match="no router to ask"):
        write([], whole)
    with pytest.raises(Unavailable, match=f"router at {NOBODY}|failed to connect"):
        write([NOBODY], whole)
    with pytest.raises(Unavailable, match="failed to connect"):
        write([NOBODY], whole, patience_s=1.0)


@BOTH
def test_the_whole_request_has_one_deadline(write) -> None:
    routers = writing(lost_after=2), writing(free_tokens=2)  # after those 2
    with serving(*routers) as addresses, pytest.raises(DeadlineExceeded):
        write(addresses, whole, timeout_s=1.0)


def test_a_wrong_request_is_not_carried_from_router_to_router() -> None:
    router, other = writing(error=InvalidMessage("prompt", "it is wrong")), writing()
    with (
        serving(router, other) as addresses,
        Client(addresses) as client,
        pytest.raises(InvalidMessage, match="it is wrong"),
    ):
        client.generate(PROMPT).text()
    assert not other.requests


def test_a_conversation_and_all_parameters_reach_the_router_and_errors_are_seen_early() -> None:
    with serving(router := writing()) as addresses, Client(addresses) as client:
        output = [{"role": "user", "content": "who?"}]
        options: dict[str, Any] = {"min_p": 0.125, "logit_bias": {3: 1.5}, "presence_penalty": 0.5, "top_logprobs": 2}
        assert client.chat(output, stop=["x", "y"], ignore_eos=True, **options).text() == TEXT
        (request,) = router.requests
        assert request.messages_json == '[{"role": "user", "content": "who?"}]' and request.prompt == ""
        assert request.stop == ("x", "y") and request.ignore_eos and request.logprobs and request.top_logprobs == 2
        assert request.sampling.min_p == 0.125 and dict(request.sampling.logit_bias) == {3: 1.5}
        with pytest.raises(InvalidMessage, match="request"):
            client.generate(PROMPT, top_k=2**40)
        with pytest.raises(TypeError, match="temprature"):
            client.generate(PROMPT, temprature=1.0)  # type: ignore[call-arg]


def test_requests_take_the_routers_in_turn_and_one_that_was_lost_comes_last() -> None:
    one, two = writing(), writing()
    with serving(one, two) as addresses, Client([*addresses, NOBODY]) as client:
        assert [client.generate(PROMPT).text() for _ in range(8)] == [TEXT] * 8
        assert {len(one.requests), len(two.requests)} <= {3, 4, 5}
        assert client.generate(PROMPT).address != NOBODY


def test_a_request_is_cancelled_from_another_thread_or_by_its_name() -> None:
    with serving(writing(free_tokens=3)) as addresses, Client(addresses) as client:
        text = client.generate(PROMPT)
        threading.Timer(0.3, text.cancel).start()
        assert len(list(text)) == 3 and text.finish_reason == "cancelled"
        named = client.generate(PROMPT)
        chunks = iter(named)
        assert next(chunks).ids == tuple(TEXT[0].encode())
        assert client.cancel(named.request.request_id)
        list(chunks)
        assert named.finish_reason == "cancelled"
        assert not client.cancel("nobody")
    with pytest.raises(MoeClusterError, match="closed"):
        client.generate(PROMPT)


def run_async(addresses: Any, use: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with AsyncClient(addresses) as client:
            await asyncio.wait_for(use(client), 30.0)

    asyncio.run(run())


def test_asyncio_a_request_is_cancelled_by_itself_by_its_name_and_with_its_task() -> None:
    router = writing(free_tokens=3)

    async def use(client: AsyncClient) -> None:
        text = client.generate(PROMPT)
        asyncio.get_running_loop().call_later(0.3, text.cancel)
        assert len([chunk async for chunk in text]) == 3 and text.finish_reason == "cancelled"
        named = client.generate(PROMPT)
        reading = asyncio.create_task(named.text())
        while len(named.ids) < 3:
            await asyncio.sleep(0.01)
        assert await client.cancel(named.request.request_id) and not await client.cancel("nobody")
        await reading
        assert named.finish_reason == "cancelled"
        task = asyncio.create_task(client.chat([{"role": "user", "content": "x"}]).text())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while router.running:  # the router notices
            await asyncio.sleep(0.01)

    with serving(router) as addresses:
        run_async(addresses, use)


def test_a_real_router_that_is_not_there_is_passed_over(cluster, expected) -> None:
    with Client([NOBODY, cluster.router_server.address]) as client:
        stream = client.generate(PROMPT, **SETTINGS)
        assert stream.text() == expected and stream.prompt_tokens == len(PROMPT)
        assert client.generate(prompt_ids=list(PROMPT.encode()), **SETTINGS).text() == expected
        assert client.status().router == "router"


def test_asyncio_against_a_real_router(cluster, expected) -> None:
    async def use(client: AsyncClient) -> None:
        texts = [client.generate(PROMPT, **SETTINGS) for _ in range(3)]
        assert await asyncio.gather(*(text.text() for text in texts)) == [expected] * 3
        async with client.generate(PROMPT, max_new_tokens=200) as left:
            async for _ in left:
                break
        while (await client.status()).running:
            await asyncio.sleep(0.01)
        with pytest.raises(ContextLengthExceeded, match=r"^prompt: .* exceed the model's 256") as caught:
            await client.generate("x" * 300, **SETTINGS).text()
        assert caught.value.field == "prompt"

    run_async([NOBODY, cluster.router_server.address], use)

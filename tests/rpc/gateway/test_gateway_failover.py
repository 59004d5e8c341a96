"""Requests continue when routers are lost: no token is lost or repeated, and no request fails that can be served."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest

from moecluster.errors import (
    BatchBroken,
    DeadlineExceeded,
    Exhausted,
    ExpertsLost,
    MoeClusterError,
    RequestFailed,
    Unavailable,
)
from moecluster.generation import GenerationRequest
from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.clusters.streamed_requests import NOBODY, TEXT, ask, assert_whole, read
from tests.support.fakes.fake_router import FakeRouter, FakeToken, word_ids, words
from tests.support.waiting import wait_until


@pytest.fixture
def gateway(first: FakeRouter, second: FakeRouter) -> Iterator[RunningGateway]:
    with running_gateway([first.address, second.address], router_wait_timeout_s=8.0) as serving:
        yield serving


@pytest.mark.parametrize(
    "breaking",
    [
        Unavailable("gone"),
        MoeClusterError("it failed"),
        BatchBroken("it broke"),
        DeadlineExceeded("no expert answered"),
        None,
    ],
    ids=["unavailable", "internal", "batch", "deadline", "cancelled"],
)
@pytest.mark.parametrize("tokens", [0, 1, 17, 29])
def test_a_request_goes_on_at_another_router(gateway, first, second, breaking, tokens) -> None:
    for router in (first, second):
        router.break_after, router.breaking = tokens, breaking  # the router asked first, and the next one too
    assert_whole(ask(gateway), first, second)
    asked = sorted(len(r.generated_ids) for r in (*first.requests, *second.requests))
    assert asked == ([0, tokens, 2 * tokens] if 2 * tokens < 30 else [0, tokens])
    failovers = (
        f'moecluster_gateway_failovers_total{{cluster="cluster",model="model"}} {len(asked) - 1 if tokens else 0}'
    )
    assert not tokens or failovers in httpx.get(f"{gateway.url}/metrics").text


def test_a_router_lost_before_its_last_word_loses_nothing(gateway, first, second) -> None:
    first.break_after, first.breaking = 30, Unavailable("gone")
    second.break_after, second.breaking = 30, Unavailable("gone")
    assert_whole(ask(gateway), first, second)
    assert sorted(len(r.generated_ids) for r in (*first.requests, *second.requests)) == [0, 30]


def test_a_killed_router_amid_streams(gateway, first, second) -> None:
    for router in (first, second):
        router.pace_s = 0.02
    texts: list[Any] = []
    threads = [threading.Thread(target=lambda i=i: texts.append(ask(gateway, seed=i))) for i in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(first.running) + len(second.running) == 6)
    assert len(first.running) == len(second.running) == 3, "they are shared among the routers"
    time.sleep(0.15)
    first.kill()
    for thread in threads:
        thread.join(20.0)
    assert len(texts) == 6
    whole = {words(word_ids(request)) for request in (*first.requests, *second.requests)}
    assert {text for text, *_ in texts} == whole and all(count == 30 for *_, count in texts)
    assert any(request.generated_ids for request in second.requests)


def test_the_only_router_is_waited_for(first) -> None:
    first.pace_s = 0.02
    with running_gateway([first.address], router_wait_timeout_s=15.0) as gateway:
        texts: list[Any] = []
        thread = threading.Thread(target=lambda: texts.append(ask(gateway)))
        thread.start()
        wait_until(lambda: first.running)
        time.sleep(0.1)
        first.kill()
        with pytest.raises(httpx.HTTPStatusError) as unwell:
            wait_until(lambda: httpx.get(f"{gateway.url}/health").raise_for_status() and False)
        assert unwell.value.response.status_code == 503
        first.revive()
        thread.join(20.0)
        assert_whole(texts[0], first)
        assert 0 < len(first.requests[-1].generated_ids) < 30


def break_in_turn(first: FakeRouter, second: FakeRouter) -> None:
    """The router asked first is lost after 10 words."""
    for router in (first, second):
        router.break_after, router.breaking = 10, Unavailable("gone")


def test_a_request_goes_on_with_the_weights_that_it_was_begun_with(gateway, first, second) -> None:
    break_in_turn(first, second)
    first.versions, second.versions = (1, 2), (2, 1)
    assert_whole(ask(gateway), first, second)
    asked = sorted((len(r.generated_ids), r.weight_version) for r in (*first.requests, *second.requests))
    begun = asked[1][1]
    assert begun in (1, 2) and asked == [(0, 0), (10, begun), (20, begun)]


def test_a_begun_request_goes_on_with_what_is_served_once_no_router_holds_its_weights(
    gateway, first, second, caplog
) -> None:
    break_in_turn(first, second)
    first.pace_s = second.pace_s = 0.02
    texts: list[Any] = []
    thread = threading.Thread(target=lambda: texts.append(ask(gateway)))
    thread.start()
    wait_until(lambda: first.running or second.running)
    first.versions = second.versions = (2,)
    thread.join(20.0)
    assert_whole(texts[0], first, second)
    asked = sorted((len(r.generated_ids), r.weight_version) for r in (*first.requests, *second.requests))
    assert asked == [(0, 0), (10, 0), (20, 2)], "from there on with the new one"
    assert (
        caplog.text.count(
            "no router holds weight version 1: a request continues with the served weights after 10 tokens"
        )
        == 1
    )


def test_a_router_that_is_busy_is_passed_over_and_when_all_are_it_is_said_when_to_try_again(
    gateway, first, second
) -> None:
    first.error = Exhausted("no room", retry_after_s=3.2)
    assert_whole(ask(gateway), second)
    second.error = Exhausted("no room", retry_after_s=1.2)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as refused, gateway.openai() as client:
            client.completions.create(**TEXT, stream=stream)
        assert refused.value.response.headers["retry-after"] == "2"
        assert refused.value.code == "rate_limit_exceeded"


def test_a_begun_request_waits_where_a_new_one_would_be_refused(gateway, first, second) -> None:
    first.break_after = second.break_after = 5
    breaking = first.breaking = second.breaking = Unavailable("gone")
    texts: list[Any] = []

    def full_now() -> None:
        wait_until(lambda: first.break_after is None or second.break_after is None)
        first.error = second.error = Exhausted("no room", retry_after_s=30.0)
        time.sleep(1.0)
        first.error = second.error = None

    threads = [threading.Thread(target=full_now), threading.Thread(target=lambda: texts.append(ask(gateway)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert breaking and len(texts) == 1
    assert_whole(texts[0], first, second)


def test_choices_of_one_request_wait_for_each_other_where_there_is_little_room(gateway, first, second) -> None:
    first.max_running = second.max_running = 1
    first.pace_s = second.pace_s = 0.01
    with gateway.openai() as client:
        done = client.completions.create(model="model", prompt="x", n=5, max_tokens=10)
    assert [len(choice.text.split()) for choice in done.choices] == [10] * 5


def test_without_any_router_it_is_said_in_time() -> None:
    with running_gateway([NOBODY], router_wait_timeout_s=1.0) as gateway, gateway.openai() as client:
        begun_s = time.monotonic()
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**TEXT)
        assert refused.value.status_code == 503 and time.monotonic() - begun_s < 5.0
        assert "127.0.0.1" not in refused.value.message, "where routers are is nobody's business"


def test_a_router_that_fails_every_request_is_not_asked_for_ever(gateway, first, second) -> None:
    first.error = second.error = MoeClusterError("the model is broken")
    with gateway.openai() as client, pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(**TEXT)
    assert refused.value.status_code == 503
    first.error = second.error = None
    assert_whole(ask(gateway), first, second)


def test_a_request_that_failed_by_itself_is_sent_to_no_other_router(gateway, first, second) -> None:
    for router in (first, second):
        break_always(router, 3, RequestFailed("the model's logits are NaN or infinite"))
    with gateway.openai() as client, pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(**TEXT)
    assert refused.value.status_code == 500 and "logits are NaN or infinite" in refused.value.message
    assert len(first.requests) + len(second.requests) == 1
    with gateway.openai() as client, pytest.raises(openai.APIError, match="logits are NaN"):
        read(client.completions.create(**TEXT, stream=True))
    assert len(first.requests) + len(second.requests) == 2


def test_experts_that_cannot_be_loaded_are_named_and_no_other_router_is_asked(gateway, first, second) -> None:
    for router in (first, second):
        break_always(router, 3, ExpertsLost("/private/model: no such directory"))
    with (
        gateway.openai() as client,
        pytest.raises(openai.InternalServerError, match="checkpoint directory is gone") as no,
    ):
        client.completions.create(**TEXT)
    assert no.value.status_code == 503 and "/private" not in no.value.message
    assert len(first.requests) + len(second.requests) == 1


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_request_is_taken_for_what_breaks_batches_after_three_of_them(gateway, first, second, tokens) -> None:
    for router in (first, second):
        break_always(router, tokens, BatchBroken("it broke"))
    with gateway.openai() as client, pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(**TEXT)
    assert refused.value.status_code == 500 and "it broke" in refused.value.message
    asked = sorted(len(r.generated_ids) for r in (*first.requests, *second.requests))
    assert asked == [0, tokens, 2 * tokens]


def break_always(router: FakeRouter, tokens: int, error: MoeClusterError) -> None:
    """Every request fails with this error, a number of tokens after this router began it."""
    script, router.breaking = router.script, error

    def write(request: GenerationRequest) -> Sequence[FakeToken]:
        router.break_after = tokens
        return script(request)

    router.script = write


def test_a_request_that_cannot_go_on_ends_with_an_error_event(gateway, first, second) -> None:
    first.break_after = second.break_after = 2
    first.breaking = second.breaking = MoeClusterError("it failed")
    with gateway.openai() as client:
        stream = client.completions.create(**TEXT, stream=True)
        text = next(iter(stream)).choices[0].text
        first.error = second.error = MoeClusterError("it failed")
        with pytest.raises(openai.APIError, match="no router of model serves now"):
            for chunk in stream:
                text += chunk.choices[0].text
    assert len(text.split()) == 2

"""The public openai client against the gateway: every kind of request and every form of response."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from moecluster.client import Client
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.fakes.fake_router import LONGEST, MAX_TOKENS, FakeRouter, word_ids, words
from tests.support.soak.generation_load import save_decided_model
from tests.support.waiting import wait_until

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with gateway.openai() as connected:
        yield connected


def expected(router: FakeRouter, number: int = -1) -> str:
    """The expected output of a request that the router received."""
    return words(word_ids(router.requests[number]))


def test_a_completion(client, router) -> None:
    done = client.completions.create(model="model", prompt="once upon a time", max_tokens=5, seed=3)
    assert done.object == "text_completion" and done.model == "model" and done.id.startswith("cmpl-")
    assert done.choices[0].text == expected(router) and done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (4, 5, 9)


def test_defaults_are_those_of_openai(client, router) -> None:
    client.completions.create(model="model", prompt="x")
    client.completions.create(model="model", prompt="x")
    first, second = router.requests[-2:]
    assert first.max_new_tokens == 16 and first.sampling.temperature == 1.0 and first.sampling.top_p == 0.0
    assert first.sampling.seed != second.sampling.seed, "without a seed every text is another"
    done = client.chat.completions.create(model="model", messages=HELLO)
    assert router.requests[-1].max_new_tokens == 0 and done.usage.completion_tokens == LONGEST


def test_every_parameter_arrives(client, router) -> None:
    client.completions.create(
        model="model", prompt="x", max_tokens=7, temperature=0.5, top_p=0.9, presence_penalty=0.1, seed=5,
        frequency_penalty=-0.2, logit_bias={"3": -100, "12": 2.5}, stop=["zzz", "qqq"], logprobs=2, user="somebody",
        extra_body={"top_k": 9, "min_p": 0.05, "repetition_penalty": 1.2, "ignore_eos": True, "metadata": {"a": "b"}},
    )  # fmt: skip
    request = router.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 9, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, -0.2, 1.2)
    assert sampling.seed == 5 and sampling.logit_bias == {3: -100.0, 12: 2.5}
    assert request.stop == ("zzz", "qqq") and request.ignore_eos and request.logprobs and request.top_logprobs == 2


def test_prompts_in_all_four_forms(client, router) -> None:
    client.completions.create(model="model", prompt=[5, 6, 7], max_tokens=2)
    assert router.requests[-1].prompt_ids == (5, 6, 7) and not router.requests[-1].prompt
    several = client.completions.create(model="model", prompt=["a b", "c"], max_tokens=2, n=2, seed=1)
    asked = sorted(router.requests[-4:], key=lambda request: request.request_id.split(".")[1])
    assert [(r.prompt, r.sampling.seed) for r in asked] == [("a b", 1), ("a b", 2), ("c", 1), ("c", 2)]
    assert [choice.text for choice in several.choices] == [words(word_ids(request)) for request in asked]
    assert several.usage.prompt_tokens == 3 and several.usage.completion_tokens == 8
    client.completions.create(model="model", prompt=[[1], [2, 3]], max_tokens=2)
    assert {request.prompt_ids for request in router.requests[-2:]} == {(1,), (2, 3)}


def test_echo_puts_the_prompt_before_the_request(client, router) -> None:
    done = client.completions.create(model="model", prompt=["one", "two"], max_tokens=3, echo=True, seed=0)
    assert [choice.text[:4] for choice in done.choices] == ["one ", "two "]
    chunks = list(client.completions.create(model="model", prompt="one", max_tokens=3, echo=True, seed=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one" + expected(router)


def test_stop_ends_a_request_before_it(client, router) -> None:
    whole = client.completions.create(model="model", prompt="x", max_tokens=8, seed=4).choices[0].text
    stop = whole.split()[3]
    done = client.completions.create(model="model", prompt="x", max_tokens=8, seed=4, stop=stop)
    assert done.choices[0].text == whole[: whole.index(stop)] and done.choices[0].finish_reason == "stop"


def test_logprobs_of_a_completion(client) -> None:
    done = client.completions.create(model="model", prompt="x", max_tokens=4, seed=4, logprobs=3)
    told = done.choices[0].logprobs
    assert "".join(told.tokens) == done.choices[0].text and told.token_logprobs == [-0.5] * 4
    assert [done.choices[0].text[at:].startswith(t) for at, t in zip(told.text_offset, told.tokens, strict=True)]
    assert [len(top) for top in told.top_logprobs] == [3] * 4
    streamed = list(client.completions.create(model="model", prompt="x", max_tokens=4, seed=4, logprobs=3, stream=True))
    offsets = [at for chunk in streamed for at in chunk.choices[0].logprobs.text_offset]
    assert offsets == told.text_offset
    alone = client.completions.create(model="model", prompt="x", max_tokens=1, seed=4, logprobs=0)
    assert alone.choices[0].logprobs.top_logprobs == [{alone.choices[0].text: -0.5}]


def test_logprobs_of_a_chat(client) -> None:
    settings = {"model": "model", "messages": HELLO, "max_completion_tokens": 13, "seed": 4, "logprobs": True}
    done = client.chat.completions.create(**settings, top_logprobs=2)
    content = done.choices[0].logprobs.content
    assert "".join(token.token for token in content) == done.choices[0].message.content
    umlaut = next(token for token in content if token.token == " über")
    assert bytes(umlaut.bytes).decode() == " über" and umlaut.logprob == -0.5
    assert [len(token.top_logprobs) for token in content] == [2] * 13
    bare = client.chat.completions.create(**settings)
    assert [token.top_logprobs for token in bare.choices[0].logprobs.content] == [[]] * 13
    streamed = list(client.chat.completions.create(**settings, stream=True))
    told = [t for chunk in streamed if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    assert [token.token for token in told] == [token.token for token in content]


def test_a_chat_streams_with_its_usage(client, router) -> None:
    stream = client.chat.completions.create(
        model="model", messages=HELLO, max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(router)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 6 + ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens == 6


def test_events_end_with_done_and_come_one_by_one(gateway, router) -> None:
    router.free_tokens = 1
    router.hold.clear()
    body = {"model": "model", "prompt": "x", "max_tokens": 3, "stream": True}
    try:
        with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=20) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            arriving = (line for line in answer.iter_lines() if line)
            lines = [next(arriving)]  # before generation continues
            router.hold.set()
            lines += arriving
    finally:
        router.hold.set()
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    told = [json.loads(line[len("data: ") :]) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in told) == expected(router)


def test_conversations_are_taken_as_clients_write_them(client, router) -> None:
    client.chat.completions.create(
        model="model",
        messages=[
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "now?"}]},
            {"role": "assistant", "content": "nothing ü", "refusal": None},
            {"role": "user", "content": "", "name": "me"},
        ],
        max_tokens=1,
    )
    assert json.loads(router.requests[-1].messages_json) == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "now?"}]},
        {"role": "assistant", "content": "nothing ü"},
        {"role": "user", "content": "", "name": "me"},
    ]


def test_n_choices_of_a_chat_differ_by_their_seed(client, router) -> None:
    done = client.chat.completions.create(model="model", messages=HELLO, n=3, seed=10, max_tokens=4)
    texts = {request.sampling.seed: words(word_ids(request)) for request in router.requests[-3:]}
    assert [choice.message.content for choice in done.choices] == [texts[seed] for seed in (10, 11, 12)]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    stream = client.chat.completions.create(model="model", messages=HELLO, n=3, seed=10, max_tokens=4, stream=True)
    streamed = ["", "", ""]
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [texts[seed] for seed in (10, 11, 12)]


def test_the_async_client_has_many_requests_at_once(gateway) -> None:
    async def ask(client: openai.AsyncOpenAI, i: int) -> tuple[str, str]:
        settings: dict[str, Any] = {
            "model": "model",
            "messages": [{"role": "user", "content": str(i)}],
            "max_tokens": 9,
            "seed": i,
        }
        whole = await client.chat.completions.create(**settings)
        stream = await client.chat.completions.create(**settings, stream=True)
        return whole.choices[0].message.content, "".join([p.choices[0].delta.content or "" async for p in stream])

    async def ask_all() -> list[tuple[str, str]]:
        async with gateway.async_openai() as client:
            return await asyncio.gather(*(ask(client, i) for i in range(16)))

    texts = asyncio.run(ask_all())
    assert all(whole == streamed and len(whole.split()) == 9 for whole, streamed in texts)


def test_models_are_listed_and_found(gateway, client) -> None:
    (model,) = client.models.list().data
    assert model.id == "model" and model.owned_by == "moecluster" and model.max_model_len == MAX_TOKENS
    assert client.models.retrieve("model") == model
    assert client.models.retrieve("cluster").id == "model", "a model that is alone has a second name"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="`gpt-4` does not exist"):
        client.completions.create(model="gpt-4", prompt="x")
    assert httpx.get(f"{gateway.url}/health").json() == {
        "status": "ready",
        "reasons": [],
        "routers": {"model": 1},
    }
    shown = httpx.get(f"{gateway.url}/metrics").text
    of = 'cluster="cluster",model="model"'  # as the series of the cluster's actors have it
    counted = 'cluster="cluster",code="404",model="model",route="/v1/completions"'
    assert f"moecluster_gateway_requests_total{{{counted}}}" in shown
    assert f"moecluster_gateway_time_to_first_token_seconds_count{{{of}}}" in shown
    series = [line for line in shown.splitlines() if not line.startswith("#")]
    assert all(label in line for line in series for label in of.split(","))


def test_wrong_requests_name_their_field(client) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "x", "temperature": 3}, "temperature"),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "n": 2, "best_of": 3}, "best_of"),
        ({"prompt": ["x"] * 100, "n": 2}, "n"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": [1], "echo": True}, "echo"),
        ({"prompt": "x", "logit_bias": {"dog": 1}}, "logit_bias"),
    ]
    for body, param in cases:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="model", **body)
        assert refused.value.param == param and refused.value.type == "invalid_request_error", refused.value.body
    chats: list[tuple[dict[str, Any], str]] = [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    ]
    for body, param in chats:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="model", **body)
        assert refused.value.param == param, refused.value.body


def test_a_request_without_room_is_said_to_be_too_long(client) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens") as refused:
        client.completions.create(model="model", prompt="x", max_tokens=MAX_TOKENS)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="model", prompt="x", max_tokens=MAX_TOKENS, stream=True)
    assert refused.value.code == "context_length_exceeded"


def test_several_models_behind_one_gateway() -> None:
    with FakeRouter("one") as one, FakeRouter("two") as two:
        sources = [
            ModelSource(
                name=name, cluster=f"of {name}", alias="cluster", seeds=ClusterAddresses(routers=(router.address,))
            )
            for name, router in (("org/one", one), ("two", two))
        ]
        with running_gateway(*sources) as gateway, gateway.openai() as client:
            assert [model.id for model in client.models.list()] == ["org/one", "two"]
            assert client.models.retrieve("org/one").id == "org/one"
            assert client.completions.create(model="two", prompt="x", max_tokens=2).model == "two"
            assert (len(one.requests), len(two.requests)) == (0, 1)
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="cluster", prompt="x")
            shown = httpx.get(f"{gateway.url}/metrics").text
        counted = 'moecluster_gateway_requests_total{cluster="%s",code="%d",model="%s",route="/v1/completions"} 1.0'
        assert counted % ("of two", 200, "two") in shown and counted % ("", 404, "") in shown


def test_requests_of_a_real_cluster(tmp_path: Path) -> None:
    directory = save_decided_model(tmp_path / "model")
    with LoopbackCluster(directory) as cluster, running_gateway([cluster.router_server.address]) as gateway:
        with Client(cluster.router_server.address) as direct:
            reference = direct.generate("def add(a, b):", max_new_tokens=24).text()
        with gateway.openai() as client:
            settings: dict[str, Any] = {
                "model": "model",
                "prompt": "def add(a, b):",
                "max_tokens": 24,
                "temperature": 0,
            }
            assert client.completions.create(**settings).choices[0].text == reference
            streamed = [chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)]
            assert "".join(streamed) == reference and len(streamed) > 5
            ids = AutoTokenizer.from_pretrained(directory)("def add(a, b):")["input_ids"]
            assert client.completions.create(**{**settings, "prompt": ids}).choices[0].text == reference
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(**{**settings, "prompt": "x" * 300})
            assert refused.value.code == "context_length_exceeded"
            with pytest.raises(openai.BadRequestError, match="has no chat template; give it a plain text instead"):
                client.chat.completions.create(model="model", messages=HELLO)
        wait_until(lambda: cluster.router.status().running == 0)

"""The gateway over a router with a real engine: chat templates, log-probabilities, seeds, stop strings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moecluster.models.native.build import register_native_family
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.soak.generation_load import save_decided_model

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
ASKED = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model")
    save_decided_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def gateway(directory: str) -> Iterator[RunningGateway]:
    with (
        LoopbackCluster(directory, max_running=8, max_waiting=16) as cluster,
        running_gateway([cluster.router_server.address]) as running,
    ):
        yield running


def greedy(directory: str, prompt: str, new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """(ids, log-probabilities of each [new_tokens, V]) of the whole model."""
    register_native_family()
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = list(prompt.encode())
    rows = []
    with torch.no_grad():
        for _ in range(new_tokens):
            rows.append(torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1))
            ids.append(int(rows[-1].argmax()))
    return ids[len(prompt) :], torch.stack(rows)


def test_chat_goes_through_the_checkpoints_template(gateway: RunningGateway, directory: str) -> None:
    client: Any = gateway.openai()
    answer = client.chat.completions.create(model="model", messages=ASKED, max_tokens=12, temperature=0)
    prompt = "user: Who are you?\nassistant:"
    ids, _ = greedy(directory, prompt, 12)
    assert answer.choices[0].message.content == AutoTokenizer.from_pretrained(directory).decode(ids)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    streamed = client.chat.completions.create(
        model="model",
        messages=ASKED,
        max_tokens=12,
        temperature=0,
        stream=True,
    )
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == answer.choices[0].message.content


def test_log_probabilities_are_those_of_the_whole_model(gateway: RunningGateway, directory: str) -> None:
    client: Any = gateway.openai()
    answer = client.chat.completions.create(
        model="model",
        messages=ASKED,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    ids, logprobs = greedy(directory, "user: Who are you?\nassistant:", 6)
    content = answer.choices[0].logprobs
    assert content is not None and content.content is not None
    for entry, token, row_V in zip(content.content, ids, logprobs, strict=True):
        assert entry.bytes == [token]
        assert entry.logprob == pytest.approx(float(row_V[token]), abs=1e-4)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(row_V.topk(3).values.tolist(), abs=1e-4)


def test_n_choices_differ_by_seed_and_come_again(gateway: RunningGateway) -> None:
    client: Any = gateway.openai()
    asked = {"model": "model", "prompt": "import", "max_tokens": 10, "n": 3, "seed": 7, "temperature": 1.5}
    first = [choice.text for choice in client.completions.create(**asked).choices]
    again = [choice.text for choice in client.completions.create(**asked).choices]
    assert first == again and len(set(first)) == 3


def test_a_tiny_temperature_is_greedy_beside_others_that_go_on(gateway: RunningGateway) -> None:
    client = gateway.openai()
    asked: dict[str, Any] = {"model": "model", "prompt": "import", "max_tokens": 20}
    greedy = client.completions.create(**asked, temperature=0).choices[0].text
    with client.completions.create(**asked, temperature=0, stream=True) as other:
        first = next(iter(other)).choices[0].text
        for temperature in (1e-40, 1e-300, 5e-324, 1e-7):
            tiny = client.completions.create(**asked, temperature=temperature, top_p=0.5, extra_body={"min_p": 1.0})
            assert tiny.choices[0].text == greedy
        assert first + "".join(chunk.choices[0].text for chunk in other) == greedy


def test_a_stop_string_ends_the_request_before_it(gateway: RunningGateway) -> None:
    client = gateway.openai()
    whole = client.completions.create(model="model", prompt="import", max_tokens=30, temperature=0).choices[0].text
    stop = whole[10:13]
    ended = client.completions.create(model="model", prompt="import", max_tokens=30, temperature=0, stop=stop)
    assert ended.choices[0].text == whole[: whole.index(stop)] and ended.choices[0].finish_reason == "stop"


def test_a_prompt_without_room_is_context_length_exceeded(gateway: RunningGateway) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        gateway.openai().completions.create(model="model", prompt="x" * 300, max_tokens=1)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "prompt"

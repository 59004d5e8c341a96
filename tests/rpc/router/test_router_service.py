import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from moecluster.client import Client
from moecluster.errors import Exhausted, InvalidMessage
from moecluster.models.config import read_model_config
from moecluster.proto import router_pb2, tensor_pb2
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc import tensors
from moecluster.rpc.server import open_channel
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.waiting import WAIT_S, wait_until

PROMPT = "def add(a, b):"


@pytest.fixture
def client(cluster: LoopbackCluster) -> Iterator[Client]:
    with Client(cluster.router_server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def reference(checkpoint: str) -> list[int]:
    """The greedy continuation by the whole model in one process."""
    read_model_config(checkpoint)  # registers the native family
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor([list(PROMPT.encode())])
    out = model.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
    return [int(token) for token in out[0, len(PROMPT) :]]


def test_greedy_request_through_the_cluster_equals_the_model_in_one_process(client, reference) -> None:
    stream = client.generate(PROMPT, max_new_tokens=24)
    text = stream.text()
    assert stream.ids == reference
    assert text == bytes(i for i in reference if i < 256).decode(errors="replace")
    assert stream.finish_reason in ("length", "stop") and stream.prompt_tokens == len(PROMPT)


def test_every_assignment_of_a_generation_is_counted(client) -> None:
    stream = client.generate(PROMPT, max_new_tokens=5)
    stream.text()
    passed = len(PROMPT) + len(stream.ids) - 1  # the last token is not run through the model
    for layer in (0, 1):
        assert sum(count for expert, count in stream.experts.items() if expert.layer == layer) == 2 * passed


def test_requests_at_the_same_time_equal_those_one_by_one(client) -> None:
    prompts = ["a = [", "class Cat", "import os"]
    settings = {"max_new_tokens": 16, "temperature": 0.9, "top_p": 0.95, "seed": 7}
    alone = [client.generate(prompt, **settings).text() for prompt in prompts]
    together: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda p=p: together.update({p: client.generate(p, **settings).text()}))
        for p in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert [together[p] for p in prompts] == alone
    assert client.generate(prompts[0], **{**settings, "seed": 8}).text() != alone[0]


def test_an_expert_actor_killed_and_revived_while_generating_changes_nothing(cluster, client, reference) -> None:
    stream = client.generate(PROMPT, max_new_tokens=24)
    chunks = iter(stream)
    next(chunks)
    cluster.kill("expert-1")
    threading.Timer(0.5, cluster.revive, ["expert-1"]).start()
    list(chunks)
    assert stream.ids == reference


def test_a_new_controller_elsewhere_disturbs_nobody(cluster, client, reference) -> None:
    before = client.status().placement
    cluster.replace_controller()
    stream = client.generate(PROMPT, max_new_tokens=24)
    stream.text()
    assert stream.ids == reference
    wait_until(lambda: client.status().placement.term == before[0] + 1)


def test_cancel_ends_a_generation_and_frees_its_place(cluster, client) -> None:
    stream = client.generate(PROMPT, max_new_tokens=200)
    chunks = iter(stream)
    next(chunks)
    with open_channel(cluster.router_server.address) as channel:
        request = router_pb2.CancelRequest(request_id=stream.request.request_id)
        assert RouterServiceStub(channel).Cancel(request, timeout=WAIT_S).found
        list(chunks)
        assert stream.finish_reason == "cancelled" and len(stream.ids) < 200
        assert not RouterServiceStub(channel).Cancel(request, timeout=WAIT_S).found
    wait_until(lambda: client.status().running == 0)


def test_a_client_that_leaves_ends_its_generation(cluster, client) -> None:
    with Client(cluster.router_server.address) as leaving:
        next(iter(leaving.generate(PROMPT, max_new_tokens=200)))
    wait_until(lambda: client.status().running == 0)


def test_too_many_generations_are_refused_and_the_others_go_on(client) -> None:
    streams = [client.generate(PROMPT, max_new_tokens=200) for _ in range(4)]
    chunks = [iter(stream) for stream in streams]
    for chunk in chunks:
        next(chunk)
    with pytest.raises(Exhausted, match="4 requests run and 0 wait already"):
        client.generate(PROMPT, max_new_tokens=1).text()
    assert next(chunks[0]) is not None
    for stream in streams:
        stream.cancel()
    wait_until(lambda: client.status().running == 0)


def test_moe_gates_and_dispatches_raw_hidden_states(client, checkpoint) -> None:
    read_model_config(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    x_TD = torch.randn(5, 32)
    y_TD, ids_TK, weights_TK = client.moe(1, x_TD)
    expected = model.model.layers[1].mlp(x_TD.unsqueeze(0))
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(y_TD, expected.reshape(5, 32), atol=1e-6, rtol=1e-5)
    assert ids_TK.shape == weights_TK.shape == (5, 2)
    torch.testing.assert_close(weights_TK.sum(dim=1), torch.ones(5))


def test_moe_ends_by_the_deadline_of_its_message(cluster) -> None:
    """Not by the deadline of its call or of the router, which are both far longer."""
    x = tensors.encode_tensor(torch.randn(3, 32))
    cluster.kill("expert-1")
    try:
        started_s = time.monotonic()
        with open_channel(cluster.router_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
            RouterServiceStub(channel).Moe(router_pb2.MoeRequest(layer=1, x=x, timeout_s=0.5), timeout=WAIT_S)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not answer in time" in str(caught.value.details())
        assert 0.5 <= time.monotonic() - started_s < 5.0
    finally:
        cluster.revive("expert-1")
    with open_channel(cluster.router_server.address) as channel:
        reply = RouterServiceStub(channel).Moe(router_pb2.MoeRequest(layer=1, x=x), timeout=WAIT_S)  # 0: the router's
    assert reply.y.shape == [3, 32]


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf")])
def test_a_deadline_that_is_none_is_refused(cluster, timeout_s) -> None:
    request = router_pb2.MoeRequest(layer=1, x=tensors.encode_tensor(torch.randn(3, 32)), timeout_s=timeout_s)
    with open_channel(cluster.router_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        RouterServiceStub(channel).Moe(request, timeout=WAIT_S)
    assert caught.value.code() == INVALID and str(caught.value.details()).startswith("timeout_s")


def generation(**changes: object) -> router_pb2.GenerateRequest:
    fields: dict[str, Any] = {"request_id": "r", "prompt": "x", "max_new_tokens": 4, **changes}
    return router_pb2.GenerateRequest(**fields)


INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
REFUSED = [
    (generation(request_id=""), INVALID, "request_id"),
    (generation(prompt=""), INVALID, "prompt"),
    (generation(prompt_ids=[1]), INVALID, "prompt"),
    (generation(prompt="", prompt_ids=[259]), INVALID, "prompt_ids"),
    (generation(prompt="", prompt_ids=[-1]), INVALID, "prompt_ids"),
    (generation(prompt="x" * 300), INVALID, "prompt"),
    (generation(max_new_tokens=-1), INVALID, "max_new_tokens"),
    (generation(max_new_tokens=2**30), EXHAUSTED, "max_new_tokens"),
    (generation(prompt="x" * (2**20 + 1)), EXHAUSTED, "prompt"),
    (generation(temperature=float("nan")), INVALID, "temperature"),
    (generation(top_p=1.5), INVALID, "top_p"),
    (generation(top_k=-1), INVALID, "top_k"),
]


@pytest.mark.parametrize(("message", "code", "field"), REFUSED)
def test_a_wrong_request_is_refused_by_name_and_the_server_serves_on(cluster, client, message, code, field) -> None:
    with open_channel(cluster.router_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(RouterServiceStub(channel).Generate(message, timeout=WAIT_S))
    assert caught.value.code() == code
    assert str(caught.value.details()).startswith(f"{field}:")
    assert client.generate("x", max_new_tokens=1).text() is not None


@pytest.mark.parametrize(
    ("layer", "x", "field"),
    [
        (9, torch.zeros(2, 32), "layer"),
        (0, torch.zeros(2, 31), "x.shape"),
        (0, torch.zeros(2, 32, dtype=torch.bfloat16), "x.dtype"),
    ],
)
def test_wrong_hidden_states_are_refused_by_name(client, layer, x, field) -> None:
    with pytest.raises(InvalidMessage, match=f"^{field}"):
        client.moe(layer, x)


def test_hidden_states_whose_bytes_do_not_fit_their_shape_are_refused(cluster) -> None:
    x = tensor_pb2.Tensor(dtype=tensor_pb2.FLOAT32, shape=[2, 32], inline=b"1234")
    with open_channel(cluster.router_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        RouterServiceStub(channel).Moe(router_pb2.MoeRequest(layer=0, x=x), timeout=WAIT_S)
    assert caught.value.code() == INVALID and str(caught.value.details()).startswith("x.inline")


def test_requests_and_tokens_are_counted(cluster, client) -> None:
    client.generate(PROMPT, max_new_tokens=3).text()
    with client.generate(PROMPT, max_new_tokens=200) as left:
        next(iter(left))
    cancelled = 'moecluster_requests_total{cluster="",model="tiny",status="cancelled"}'
    wait_until(lambda: cancelled in cluster.metrics.render())
    shown = cluster.metrics.render()
    assert 'moecluster_requests_total{cluster="",model="tiny",status="length"}' in shown
    assert "moecluster_time_to_first_token_seconds_count" in shown
    assert 'moecluster_dispatch_seconds_count{cluster="",model="tiny",transport="shm"}' in shown

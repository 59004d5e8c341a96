"""Targets: every decoder of messages, requests and replies alike, with tensors inline and in a peer's memory."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from google.protobuf.message import Message

from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.proto import controller_pb2, expert_pb2, router_pb2, tensor_pb2
from moecluster.rpc.controller import load_messages, operation_messages, placement_messages, status_messages
from moecluster.rpc.expert import messages, request_messages
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.rpc.router import layer_messages
from moecluster.rpc.router import messages as router_messages
from moecluster.rpc.same_host.segment import PeerSegment, Segment
from moecluster.rpc.tensors import ROW_DTYPES, decode_tensor, encode_tensor
from moecluster.types import ActorAddress, ComputeResult, ExpertId, OptimizerSettings, Phase, Placement, Replica
from tests.support.expert.batches import make_batch
from tests.support.fuzz.bytes_as_choices import Choices
from tests.support.fuzz.messages import message_of
from tests.support.fuzz.run import Target

SEGMENT_BYTES = 2**16
EXPERTS = (ExpertId(layer=0, index=1), ExpertId(layer=3, index=0))
SHAPES: tuple[tuple[int | None, ...], ...] = ((None, None), (4, 8), (4,), (None,), ())
BATCH = make_batch({0: [0, 1], 2: [1]}, rows=2, width=4)
BACKWARD = make_batch({0: [0, 1], 2: [1]}, rows=2, width=4, phase=Phase.BACKWARD)
UNSUMMED = make_batch({0: [0, 1], 2: [1]}, rows=2, width=4, unsummed=True)
LOAD = LoadRequest(
    term=1, experts=EXPERTS, checkpoint="/model", optimizer=OptimizerSettings(name="adamw"),
    peer=ActorAddress(actor="a", address="127.0.0.1:1", incarnation="i"),
)  # fmt: skip
PLACEMENT = Placement(
    term=1, generation=2, layer_experts={0: 2, 3: 1},
    actors={"a": ActorAddress(actor="a", address="127.0.0.1:1", incarnation="i", node="n")},
    replicas=tuple(Replica(expert=expert, actor="a", share=1.0) for expert in EXPERTS),
)  # fmt: skip


@contextmanager
def decoders() -> Iterator[Mapping[str, Target]]:
    """Context: the targets by name."""
    segment = Segment(SEGMENT_BYTES)
    segment.write(torch.ones(4, 8))
    peer = PeerSegment(os.getpid(), segment.fd, segment.size_bytes)
    try:
        yield {"tensor": partial(_tensor, segment, peer), **_batches(segment, peer), **_records()}
    finally:
        peer.close()
        segment.close()


def _tensor(segment: Segment, peer: PeerSegment, data: bytes) -> None:
    good = [encode_tensor(torch.ones(4, 8, dtype=dtype)) for dtype in ROW_DTYPES]
    good.append(tensor_pb2.Tensor(
        dtype=good[0].dtype, shape=[4, 8], region=tensor_pb2.Region(offset=64, length_bytes=128, sequence=1)
    ))  # fmt: skip
    choices = Choices(data)
    shape, with_peer = choices.one_of(SHAPES), choices.number(2)
    message = message_of(choices.rest(), tensor_pb2.Tensor, good)
    if message is None:
        return
    dtypes = (*ROW_DTYPES, torch.int32, torch.int64)
    value = decode_tensor(message, "x", dtypes=dtypes, shape=shape, peer=peer if with_peer else None)
    assert len(value.shape) == len(shape) and value.numel() == math.prod(message.shape)
    value.double().sum()  # reads every element: none lies outside of the memory


def _batches(segment: Segment, peer: PeerSegment) -> dict[str, Target]:
    def batch(message: expert_pb2.Batch) -> None:
        found = messages.decode_batch(message, peer)
        assert len(found.pair_rows_P) == sum(found.pair_counts) and int(found.pair_rows_P.max()) < len(found.x_ND)
        found.x_ND.double().sum()

    def result(asked: Any, message: expert_pb2.BatchReply) -> None:
        found = messages.decode_result(message, asked, peer)
        for value in (found.y_ND, found.y_PD, found.grad_x_ND, found.grad_w_P):
            if value is not None:
                value.double().sum()

    rows = ComputeResult(request_id=1, y_ND=BATCH.x_ND)
    gradients = ComputeResult(request_id=1, grad_x_ND=BATCH.x_ND, grad_w_P=BATCH.pair_weights_P)
    encoded = [messages.encode_batch(one) for one in (BATCH, BACKWARD, UNSUMMED)]
    shared = Segment(SEGMENT_BYTES)  # as a router writes: regions instead of bytes
    try:
        encoded.append(messages.encode_batch(BATCH, shared))
    finally:
        shared.close()
    return {
        "batch": _of(expert_pb2.Batch, batch, *encoded),
        "result": _of(expert_pb2.BatchReply, partial(result, BATCH), messages.encode_result(rows)),
        "result of BACKWARD": _of(expert_pb2.BatchReply, partial(result, BACKWARD), messages.encode_result(gradients)),
        "result of unsummed rows": _of(expert_pb2.BatchReply, partial(result, UNSUMMED), messages.encode_result(rows)),
    }


def _records() -> dict[str, Target]:
    """Messages without tensors, but for the replies of a layer."""
    x_TD = BATCH.x_ND
    layer = router_pb2.MoeReply(
        y=encode_tensor(x_TD),
        ids=encode_tensor(torch.ones(2, 2, dtype=torch.int64)),
        weights=encode_tensor(torch.ones(2, 2)),
    )
    chunk = GenerationChunk(ids=(1, 2), text="ab", finish_reason="stop", experts={EXPERTS[0]: 3})
    request = GenerationRequest(request_id="r", prompt="x", max_new_tokens=2, stop=("a",))
    notice = PlacementNotice(term=1, generation=2, checkpoint="/model", weight_versions=(1, 2))
    placement = placement_messages.encode_placement(PLACEMENT, 5.0)
    return {
        "load": _of(
            expert_pb2.LoadRequest, request_messages.decode_load_request, request_messages.encode_load_request(LOAD)
        ),
        "placement notice": _of(
            expert_pb2.SetPlacementRequest,
            request_messages.decode_placement_notice,
            request_messages.encode_placement_notice(notice),
        ),
        "placement": _of(controller_pb2.Placement, placement_messages.decode_placement, placement),
        "load report": _of(controller_pb2.LoadReport, load_messages.decode_load),
        "cluster loads": _of(controller_pb2.LoadsReply, load_messages.decode_cluster_loads),
        "operation": _of(controller_pb2.Operation, operation_messages.decode_operation),
        "operations": _of(controller_pb2.OperationList, operation_messages.decode_operations),
        "plan": _of(controller_pb2.PlanReply, operation_messages.decode_plan),
        "controller status": _of(controller_pb2.ControllerStatus, status_messages.decode_status),
        "router state": _of(controller_pb2.RouterState, status_messages.decode_router_state),
        "generation request": _of(
            router_pb2.GenerateRequest,
            router_messages.decode_generation_request,
            router_messages.encode_generation_request(request),
        ),
        "chunk": _of(router_pb2.GenerateReply, router_messages.decode_chunk, router_messages.encode_chunk(chunk)),
        "router status": _of(router_pb2.RouterStatus, router_messages.decode_router_status),
        "layer": _of(router_pb2.MoeReply, lambda reply: layer_messages.decode_moe_reply(reply, x_TD), layer),
    }


def _of(kind: type[Message], decode: Callable[[Any], object], *good: Message) -> Target:
    def target(data: bytes) -> None:
        message = message_of(data, kind, good)
        if message is not None:
            decode(message)

    return target

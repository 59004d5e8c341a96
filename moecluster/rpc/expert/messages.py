"""Encodes and decodes batches and results. Every received field is checked here before it is used."""

from collections.abc import Callable
from itertools import accumulate, pairwise

import numpy as np
import torch

from moecluster.errors import InvalidMessage
from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.rpc.fields import MAX_MESSAGE_BYTES, checked_count
from moecluster.rpc.same_host.segment import PeerSegment, Segment
from moecluster.rpc.tensors import ROW_DTYPES, decode_tensor, encode_tensor, region_of
from moecluster.types import ComputeBatch, ComputeResult, MicroBatchTag, Phase, PlacementNumber, StepTag

MAX_CONTENT_BYTES = MAX_MESSAGE_BYTES - 2**20  # of a message's tensors; leaves room for its other fields
MAX_DEADLINE_S = 3600.0

_PHASES = {
    expert_pb2.FORWARD: Phase.FORWARD,
    expert_pb2.TRAIN_FORWARD: Phase.TRAIN_FORWARD,
    expert_pb2.BACKWARD: Phase.BACKWARD,
}
_PHASE_CODES = {phase: code for code, phase in _PHASES.items()}


def _check_size(field: str, *tensors: torch.Tensor | None) -> None:
    """Raises InvalidMessage for a size at which gRPC would end the whole stream."""
    size_bytes = sum(t.nbytes for t in tensors if t is not None)
    if size_bytes > MAX_CONTENT_BYTES:
        raise InvalidMessage(field, f"{size_bytes} bytes in one message, at most {MAX_CONTENT_BYTES}")


def encode_batch(batch: ComputeBatch, segment: Segment | None = None) -> expert_pb2.Batch:
    """Encodes a batch. Raises InvalidMessage if it is too large."""
    _check_size("x", batch.x_ND, batch.grad_ND, batch.pair_rows_P, batch.pair_weights_P)
    message = expert_pb2.Batch(
        request_id=batch.request_id,
        placement_term=batch.placement.term,
        generation=batch.placement.generation,
        layer=batch.layer,
        phase=_PHASE_CODES[batch.phase],
        weight_version=batch.weight_version,
        deadline_s=batch.deadline_s,
        incarnation=batch.incarnation,
        unsummed=batch.unsummed,
        experts=batch.experts,
        expert_pairs=batch.pair_counts,
        x=encode_tensor(batch.x_ND, segment),
        pair_rows=encode_tensor(batch.pair_rows_P),
        pair_weights=encode_tensor(batch.pair_weights_P),
    )
    if batch.train is not None:
        tag = batch.train
        message.step.CopyFrom(encode_step(tag.step))
        message.rank, message.micro_batch, message.pass_index = tag.rank, tag.micro_batch, tag.pass_index
    if batch.grad_ND is not None:
        message.grad.CopyFrom(encode_tensor(batch.grad_ND, segment))
    return message


def encode_step(tag: StepTag) -> expert_pb2.StepTag:
    return expert_pb2.StepTag(term=tag.term, step=tag.step, attempt=tag.attempt)


def decode_step(message: expert_pb2.StepTag) -> StepTag:
    return StepTag(term=message.term, step=message.step, attempt=message.attempt)


def decode_batch(message: expert_pb2.Batch, peer: PeerSegment | None = None) -> ComputeBatch:
    """Decodes a batch; its tensors are views of the message or of the segment. Raises InvalidMessage, naming the
    field."""
    phase = _PHASES.get(message.phase)
    if phase is None:
        raise InvalidMessage("phase", f"{message.phase} is none of FORWARD, TRAIN_FORWARD, BACKWARD")
    if not 0 < message.deadline_s <= MAX_DEADLINE_S:  # false for NaN too
        raise InvalidMessage("deadline_s", f"{message.deadline_s}, not within 0 and {MAX_DEADLINE_S:g}")
    if message.layer < 0:
        raise InvalidMessage("layer", f"{message.layer} is negative")
    train = None
    if phase is not Phase.FORWARD:
        if not message.HasField("step"):
            raise InvalidMessage("step", f"a {phase.value} message needs one")
        train = MicroBatchTag(
            step=decode_step(message.step),
            rank=checked_count(message.rank, "rank"),
            micro_batch=checked_count(message.micro_batch, "micro_batch"),
            pass_index=checked_count(message.pass_index, "pass_index"),
        )
    experts, counts = tuple(message.experts), tuple(message.expert_pairs)
    if len(experts) != len(counts) or not experts:
        raise InvalidMessage("expert_pairs", f"{len(counts)} counts for {len(experts)} experts")
    if experts[0] < 0 or any(a >= b for a, b in pairwise(experts)):
        raise InvalidMessage("experts", "not ascending from 0 on")
    if min(counts) < 1:
        raise InvalidMessage("expert_pairs", "a count below 1")
    num_pairs = sum(counts)
    x_ND = decode_tensor(message.x, "x", dtypes=ROW_DTYPES, shape=(None, None), peer=peer)
    pair_rows_P = decode_tensor(message.pair_rows, "pair_rows", dtypes=(torch.int32,), shape=(num_pairs,))
    pair_weights_P = decode_tensor(message.pair_weights, "pair_weights", dtypes=(torch.float32,), shape=(num_pairs,))
    rows = pair_rows_P.numpy()
    if rows.min() < 0 or rows.max() >= len(x_ND):
        raise InvalidMessage("pair_rows", f"an index outside the {len(x_ND)} rows of x")
    if num_pairs > len(experts):  # else each expert has one pair
        descents = np.flatnonzero(rows[1:] < rows[:-1]) + 1
        if not set(descents.tolist()) <= set(accumulate(counts)):
            raise InvalidMessage("pair_rows", "not ascending within an expert")
    grad_ND = None
    if phase is Phase.BACKWARD:
        grad_ND = decode_tensor(message.grad, "grad", dtypes=(x_ND.dtype,), shape=tuple(x_ND.shape), peer=peer)
    return ComputeBatch(
        request_id=message.request_id,
        layer=message.layer,
        phase=phase,
        x_ND=x_ND,
        experts=experts,
        pair_counts=counts,
        pair_rows_P=pair_rows_P,
        pair_weights_P=pair_weights_P,
        deadline_s=message.deadline_s,
        placement=PlacementNumber(message.placement_term, message.generation),
        weight_version=message.weight_version,
        train=train,
        incarnation=message.incarnation,
        grad_ND=grad_ND,
        unsummed=message.unsummed,
    )


def encode_result(result: ComputeResult, segment: Segment | None = None) -> expert_pb2.BatchReply:
    """Encodes a result. Raises InvalidMessage if it is too large."""
    message = expert_pb2.BatchReply(request_id=result.request_id, code=expert_pb2.OK)
    y = result.y_ND if result.y_ND is not None else result.y_PD
    _check_size("y", y, result.grad_x_ND, result.grad_w_P)
    if y is not None:
        message.y.CopyFrom(encode_tensor(y, segment))
    if result.grad_x_ND is not None and result.grad_w_P is not None:
        message.grad_x.CopyFrom(encode_tensor(result.grad_x_ND, segment))
        message.grad_w.CopyFrom(encode_tensor(result.grad_w_P))
    return message


def decode_result(
    message: expert_pb2.BatchReply,
    batch: ComputeBatch,
    peer: PeerSegment | None = None,
    release: Callable[[int], None] = lambda sequence: None,
) -> ComputeResult:
    """Decodes the result of a batch. Copies it out of the peer's segment and releases the regions there."""

    def take(tensor: tensor_pb2.Tensor, field: str, rows: int) -> torch.Tensor:
        value = decode_tensor(tensor, field, dtypes=(batch.x_ND.dtype,), shape=(rows, batch.x_ND.shape[1]), peer=peer)
        region = region_of(tensor)
        if region is None:
            return value
        assert peer is not None
        value = value.clone()
        peer.check(region)
        release(region.sequence)
        return value

    num_rows, num_pairs = len(batch.x_ND), len(batch.pair_rows_P)
    if batch.phase is Phase.BACKWARD:
        return ComputeResult(
            request_id=message.request_id,
            grad_x_ND=take(message.grad_x, "grad_x", num_rows),
            grad_w_P=decode_tensor(message.grad_w, "grad_w", dtypes=(torch.float32,), shape=(num_pairs,)),
        )
    if batch.unsummed:
        return ComputeResult(request_id=message.request_id, y_PD=take(message.y, "y", num_pairs))
    return ComputeResult(request_id=message.request_id, y_ND=take(message.y, "y", num_rows))

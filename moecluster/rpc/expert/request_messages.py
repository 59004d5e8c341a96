"""Encodes and decodes load requests and placement notices. Every received field is checked before it is used."""

import dataclasses

from moecluster.errors import InvalidMessage
from moecluster.proto import expert_pb2
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.rpc.fields import checked_address, checked_name, decode_experts, encode_experts
from moecluster.types import ActorAddress, OptimizerSettings

MAX_TIMEOUT_S = 3600.0
OPTIMIZERS = ("adamw", "sgd")


def encode_load_request(request: LoadRequest) -> expert_pb2.LoadRequest:
    """Encodes a load request."""
    peer = request.peer
    message = expert_pb2.LoadRequest(
        term=request.term,
        experts=encode_experts(request.experts),
        checkpoint=request.checkpoint,
        dtype=request.dtype,
        weight_version=request.weight_version,
        replace=request.replace,
        training_term=request.training_term,
        timeout_s=request.timeout_s,
        peer_address=peer.address if peer is not None else "",
        peer_incarnation=peer.incarnation if peer is not None else "",
        max_bytes_per_s=request.max_bytes_per_s,
    )
    if request.optimizer is not None:
        message.optimizer.CopyFrom(expert_pb2.OptimizerSettings(**dataclasses.asdict(request.optimizer)))
    return message


def decode_load_request(message: expert_pb2.LoadRequest) -> LoadRequest:
    """Decodes a load request. Raises InvalidMessage, naming the field."""
    if not 0 < message.timeout_s <= MAX_TIMEOUT_S:  # false for NaN too
        raise InvalidMessage("timeout_s", f"{message.timeout_s}, not within 0 and {MAX_TIMEOUT_S:g}")
    return LoadRequest(
        term=message.term,
        experts=decode_experts(message.experts, "experts"),
        checkpoint=message.checkpoint,
        dtype=message.dtype,
        weight_version=message.weight_version,
        optimizer=_decode_optimizer(message.optimizer) if message.HasField("optimizer") else None,
        replace=message.replace,
        training_term=message.training_term,
        timeout_s=message.timeout_s,
        peer=_decode_peer(message),
        max_bytes_per_s=message.max_bytes_per_s,
    )


def _decode_optimizer(message: expert_pb2.OptimizerSettings) -> OptimizerSettings:
    if message.name not in OPTIMIZERS:
        raise InvalidMessage("optimizer.name", f"{message.name[:40]!r} is none of {', '.join(OPTIMIZERS)}")
    settings = OptimizerSettings(
        name=message.name,
        beta1=message.beta1,
        beta2=message.beta2,
        eps=message.eps,
        weight_decay=message.weight_decay,
        momentum=message.momentum,
    )
    if not (0 <= settings.beta1 < 1 and 0 <= settings.beta2 < 1 and 0 <= settings.momentum < 1):
        raise InvalidMessage("optimizer", "beta1, beta2 and momentum lie in [0, 1)")
    if not (settings.eps >= 0 and settings.weight_decay >= 0):
        raise InvalidMessage("optimizer", "eps and weight_decay are not negative")
    return settings


def _decode_peer(message: expert_pb2.LoadRequest) -> ActorAddress | None:
    if not message.peer_address:
        if message.peer_incarnation:
            raise InvalidMessage("peer_address", "missing, and there is a peer_incarnation")
        return None
    address = checked_address(message.peer_address, "peer_address")
    if not message.peer_incarnation:
        raise InvalidMessage("peer_incarnation", "missing")
    incarnation = checked_name(message.peer_incarnation, "peer_incarnation")
    # The message does not name the peer; the name is only used in errors.
    return ActorAddress(actor=address, address=address, incarnation=incarnation)


def encode_placement_notice(notice: PlacementNotice) -> expert_pb2.SetPlacementRequest:
    """Encodes a placement notice."""
    return expert_pb2.SetPlacementRequest(
        term=notice.term,
        generation=notice.generation,
        checkpoint=notice.checkpoint,
        snapshot=notice.snapshot,
        weight_version=notice.weight_version,
        weight_versions=notice.weight_versions,
    )


def decode_placement_notice(message: expert_pb2.SetPlacementRequest) -> PlacementNotice:
    """Decodes a placement notice. The actor itself checks the numbers against its state."""
    return PlacementNotice(
        term=message.term,
        generation=message.generation,
        checkpoint=message.checkpoint,
        snapshot=message.snapshot,
        weight_version=message.weight_version,
        weight_versions=tuple(message.weight_versions),
    )

"""Converts placements to messages and back, with checks of what is received."""

from collections import defaultdict

from moecluster.errors import InvalidMessage
from moecluster.proto import controller_pb2
from moecluster.rpc.fields import (
    MAX_REASON_LENGTH,
    SHARE_TOLERANCE,
    checked_address,
    checked_name,
    checked_optional_name,
    checked_path,
    checked_share,
    decode_expert,
    encode_expert,
)
from moecluster.types import ActorAddress, ExpertId, Placement, Replica

MAX_LEASE_S = 3600.0


def encode_placement(placement: Placement, lease_s: float) -> controller_pb2.Placement:
    """Returns the message of a placement, with the duration of its receiver's lease."""
    return controller_pb2.Placement(
        term=placement.term,
        generation=placement.generation,
        actors=[
            controller_pb2.ActorAddress(actor=a.actor, address=a.address, incarnation=a.incarnation, node=a.node)
            for a in placement.actors.values()
        ],
        replicas=[encode_replica(replica) for replica in placement.replicas],
        layer_experts=placement.layer_experts,
        lease_s=lease_s,
        held=placement.held,
        weight_version=placement.weight_version,
        checkpoint=placement.checkpoint,
        next_weight_version=placement.next_weight_version,
        next_checkpoint=placement.next_checkpoint,
        old_weight_version=placement.old_weight_version,
        problem=placement.problem[:MAX_REASON_LENGTH],
    )


def decode_placement(message: controller_pb2.Placement) -> tuple[Placement, float]:
    """Returns (placement, lease in seconds) of a message. Raises InvalidMessage, naming the field."""
    if not message.term:
        raise InvalidMessage("term", "0, terms begin at 1")
    if not 0 < message.lease_s <= MAX_LEASE_S:  # false for NaN too
        raise InvalidMessage("lease_s", f"{message.lease_s}, not within 0 and {MAX_LEASE_S:g}")
    actors: dict[str, ActorAddress] = {}
    for entry in message.actors:
        name = checked_name(entry.actor, "actors.actor")
        if name in actors:
            raise InvalidMessage("actors.actor", f"{name} is named twice")
        actors[name] = ActorAddress(
            actor=name,
            address=checked_address(entry.address, "actors.address"),
            incarnation=checked_name(entry.incarnation, "actors.incarnation"),
            node=checked_optional_name(entry.node, "actors.node"),
        )
    layer_experts = checked_layer_experts(dict(message.layer_experts))
    replicas = tuple(decode_replica(replica, "replicas") for replica in message.replicas)
    for replica in replicas:
        if replica.expert.index >= layer_experts.get(replica.expert.layer, 0):
            raise InvalidMessage("replicas.expert", f"{replica.expert} is not within layer_experts")
        if replica.actor not in actors:
            raise InvalidMessage("replicas.actor", f"{replica.actor[:40]!r} is none of the actors")
    check_distinct(replicas, "replicas")
    _check_shares(replicas)
    placement = Placement(
        term=message.term,
        generation=message.generation,
        layer_experts=layer_experts,
        actors=actors,
        replicas=replicas,
        held=message.held,
        weight_version=message.weight_version,
        checkpoint=checked_path(message.checkpoint, "checkpoint") if message.checkpoint else "",
        next_weight_version=message.next_weight_version,
        next_checkpoint=(
            checked_path(message.next_checkpoint, "next_checkpoint") if message.next_weight_version else ""
        ),
        old_weight_version=message.old_weight_version,
        problem=message.problem[:MAX_REASON_LENGTH],
    )
    return placement, message.lease_s


def encode_replica(replica: Replica) -> controller_pb2.Replica:
    """Returns the message of a replica."""
    return controller_pb2.Replica(expert=encode_expert(replica.expert), actor=replica.actor, share=replica.share)


def decode_replica(message: controller_pb2.Replica, field: str) -> Replica:
    """Returns the replica of a message. Whether its actor exists is for the caller to check."""
    return Replica(
        expert=decode_expert(message.expert, f"{field}.expert"),
        actor=checked_name(message.actor, f"{field}.actor"),
        share=checked_share(message.share, f"{field}.share"),
    )


def checked_layer_experts(layer_experts: dict[int, int]) -> dict[int, int]:
    """Returns MoE layer -> its number of experts. Raises InvalidMessage for a negative layer or one without experts."""
    if any(layer < 0 or count < 1 for layer, count in layer_experts.items()):
        raise InvalidMessage("layer_experts", "a negative layer, or one without experts")
    return layer_experts


def check_distinct(replicas: tuple[Replica, ...], field: str) -> None:
    """Raises InvalidMessage if an actor has two replicas of an expert."""
    seen: set[tuple[ExpertId, str]] = set()
    for replica in replicas:
        if (replica.expert, replica.actor) in seen:
            raise InvalidMessage(field, f"expert {replica.expert} appears twice on {replica.actor}")
        seen.add((replica.expert, replica.actor))


def _check_shares(replicas: tuple[Replica, ...]) -> None:
    total: dict[ExpertId, float] = defaultdict(float)
    for replica in replicas:
        total[replica.expert] += replica.share
    for expert, share in total.items():
        if abs(share - 1) > SHARE_TOLERANCE:
            raise InvalidMessage("replicas.share", f"those of expert {expert} sum to {share:g}, not 1")

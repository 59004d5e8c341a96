"""The snapshot that a controller leaves with the actors for its successor, as bytes that are checked on decoding."""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from moecluster.errors import InvalidMessage
from moecluster.growing import check_ahead
from moecluster.proto import controller_pb2
from moecluster.rpc.controller.operation_messages import decode_operation, encode_operation
from moecluster.rpc.controller.placement_messages import check_distinct
from moecluster.rpc.fields import checked_names, checked_path, checked_share, decode_experts, encode_expert
from moecluster.types import ExpertId, Operation, Replica, WeightVersion

MAX_VERSIONS = 2  # at once


@dataclass(frozen=True, kw_only=True)
class ControllerSnapshot:
    """The current state, and the operations."""

    actors: tuple[str, ...]  # of the cluster
    leaving: tuple[str, ...]  # of those: being drained
    replicas: tuple[Replica, ...]  # on those actors
    operations: tuple[Operation, ...]  # the newest
    cold: tuple[ExpertId, ...]  # without a replica on purpose
    versions: tuple[WeightVersion, ...] = ()  # newest last; empty: from a controller without versions
    weight_version: int = 0  # of those: the published one, which new requests use
    last_weight_version: int = 0  # the highest number ever assigned


def encode_snapshot(snapshot: ControllerSnapshot) -> bytes:
    """Returns the snapshot as bytes; 58 layers of 320 replicas take about 400 KB."""
    position = {actor: place for place, actor in enumerate(snapshot.actors)}
    message = controller_pb2.ControllerSnapshot(
        actors=snapshot.actors,
        leaving=snapshot.leaving,
        replica_layers=[r.expert.layer for r in snapshot.replicas],
        replica_experts=[r.expert.index for r in snapshot.replicas],
        replica_actors=[position[r.actor] for r in snapshot.replicas],
        replica_shares=[r.share for r in snapshot.replicas],
        operations=[encode_operation(operation) for operation in snapshot.operations],
        cold=[encode_expert(expert) for expert in snapshot.cold],
        versions=[controller_pb2.WeightVersion(version=v.version, checkpoint=v.checkpoint) for v in snapshot.versions],
        weight_version=snapshot.weight_version,
        last_weight_version=snapshot.last_weight_version,
    )
    return message.SerializeToString()


def decode_snapshot(content: bytes) -> ControllerSnapshot:
    """Returns the snapshot of such bytes. Raises InvalidMessage, naming the field."""
    try:
        message = controller_pb2.ControllerSnapshot.FromString(content)
    except DecodeError as exc:
        raise InvalidMessage("snapshot", f"{len(content)} bytes that are no ControllerSnapshot") from exc
    actors = checked_names(message.actors, "actors")
    leaving = checked_names(message.leaving, "leaving")
    if not set(leaving) <= set(actors):
        raise InvalidMessage("leaving", "an actor that is none of actors")
    return ControllerSnapshot(
        actors=actors,
        leaving=leaving,
        replicas=_decode_replicas(message, actors),
        operations=tuple(decode_operation(operation) for operation in message.operations),
        cold=decode_experts(message.cold, "cold"),
        versions=_decode_versions(message),
        weight_version=message.weight_version,
        last_weight_version=message.last_weight_version,
    )


def _decode_versions(message: controller_pb2.ControllerSnapshot) -> tuple[WeightVersion, ...]:
    versions = tuple(
        WeightVersion(version=v.version, checkpoint=checked_path(v.checkpoint, "versions.checkpoint"))
        for v in message.versions
    )
    numbers = [v.version for v in versions]
    if len(numbers) > MAX_VERSIONS or 0 in numbers or sorted(set(numbers)) != numbers:
        raise InvalidMessage("versions", f"{numbers[:5]}, expected at most {MAX_VERSIONS} growing numbers above 0")
    if numbers and (message.weight_version not in numbers or message.last_weight_version < numbers[-1]):
        raise InvalidMessage(
            "weight_version",
            f"{message.weight_version} and last_weight_version: {message.last_weight_version} "
            f"do not go with versions {numbers}",
        )
    check_ahead(message.last_weight_version, max(numbers, default=0), "last_weight_version")
    return versions


def _decode_replicas(message: controller_pb2.ControllerSnapshot, actors: tuple[str, ...]) -> tuple[Replica, ...]:
    columns = (message.replica_layers, message.replica_experts, message.replica_actors, message.replica_shares)
    if len({len(column) for column in columns}) != 1:
        raise InvalidMessage(
            "replica_layers", f"columns of {', '.join(str(len(c)) for c in columns)} entries, not equal"
        )
    for name, column, end in (
        ("replica_layers", message.replica_layers, None),
        ("replica_experts", message.replica_experts, None),
        ("replica_actors", message.replica_actors, len(actors)),
    ):
        if column and (min(column) < 0 or (end is not None and max(column) >= end)):
            raise InvalidMessage(name, "an entry that is negative or too large")
    replicas = tuple(
        Replica(
            expert=ExpertId(layer=layer, index=index),
            actor=actors[actor],
            share=checked_share(share, "replica_shares"),
        )
        for layer, index, actor, share in zip(*columns, strict=True)
    )
    check_distinct(replicas, "replicas")
    return replicas

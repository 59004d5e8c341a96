"""The controller's messages to records and back. What comes off the wire is checked here before it is used."""

import math
from collections import defaultdict

from moecluster.errors import InvalidMessage
from moecluster.proto import controller_pb2, tensor_pb2
from moecluster.types import ActorAddress, ActorState, ControllerStatus, ExpertId, LoadSnapshot, Placement, Replica

MAX_NAME_LENGTH = 256
MAX_PATH_LENGTH = 4096
MAX_REASON_LENGTH = 1000
MAX_LEASE_S = 3600.0
MAX_WINDOW_S = 3600.0
SHARE_TOLERANCE = 1e-6


def encode_placement(placement: Placement, lease_s: float) -> controller_pb2.Placement:
    """The message of a placement, with the lease that its receiver holds."""
    return controller_pb2.Placement(
        term=placement.term,
        generation=placement.generation,
        actors=[
            controller_pb2.ActorAddress(actor=a.actor, address=a.address, incarnation=a.incarnation)
            for a in placement.actors.values()
        ],
        replicas=[
            controller_pb2.Replica(
                expert=tensor_pb2.ExpertRef(layer=r.expert.layer, index=r.expert.index), actor=r.actor, share=r.share
            )
            for r in placement.replicas
        ],
        layer_experts=placement.layer_experts,
        lease_s=lease_s,
    )


def decode_placement(message: controller_pb2.Placement) -> tuple[Placement, float]:
    """(the placement, the lease in seconds) of a message. Raises InvalidMessage, naming the field."""
    if not message.term:
        raise InvalidMessage("term: 0, terms begin at 1")
    if not 0 < message.lease_s <= MAX_LEASE_S:  # false for NaN too
        raise InvalidMessage(f"lease_s: {message.lease_s}, not within 0 and {MAX_LEASE_S:g}")
    actors: dict[str, ActorAddress] = {}
    for entry in message.actors:
        name = checked_name(entry.actor, "actors.actor")
        if name in actors:
            raise InvalidMessage(f"actors.actor: {name} is named twice")
        actors[name] = ActorAddress(
            actor=name,
            address=_checked_address(entry.address, "actors.address"),
            incarnation=checked_name(entry.incarnation, "actors.incarnation"),
        )
    layer_experts = dict(message.layer_experts)
    if any(layer < 0 or count < 1 for layer, count in layer_experts.items()):
        raise InvalidMessage("layer_experts: a negative layer, or one without experts")
    placement = Placement(
        term=message.term,
        generation=message.generation,
        layer_experts=layer_experts,
        actors=actors,
        replicas=tuple(_decode_replica(r, actors, layer_experts) for r in message.replicas),
    )
    _check_shares(placement.replicas)
    return placement, message.lease_s


def encode_status(status: ControllerStatus) -> controller_pb2.ControllerStatus:
    """The message of the controller's status."""
    return controller_pb2.ControllerStatus(
        term=status.term,
        generation=status.generation,
        actors=[
            controller_pb2.ActorState(
                actor=a.actor,
                address=a.address,
                incarnation=a.incarnation,
                phase=a.phase,
                experts=a.experts,
                restarts=a.restarts,
            )
            for a in status.actors
        ],
        checkpoint=status.checkpoint,
        routers=status.routers,
    )


def decode_status(message: controller_pb2.ControllerStatus) -> ControllerStatus:
    """The controller's status of a message."""
    return ControllerStatus(
        term=message.term,
        generation=message.generation,
        actors=tuple(
            ActorState(
                actor=a.actor,
                address=a.address,
                incarnation=a.incarnation,
                phase=a.phase,
                experts=a.experts,
                restarts=a.restarts,
            )
            for a in message.actors
        ),
        checkpoint=message.checkpoint,
        routers=message.routers,
    )


def checked_name(name: str, field: str) -> str:
    """The name of a router, an actor or a request: not empty, printable, of bounded length."""
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidMessage(f"{field}: {name[:40]!r}, expected 1 to {MAX_NAME_LENGTH} printable characters")
    return name


def checked_path(path: str, field: str) -> str:
    """A directory's path: not empty, no zero byte, of bounded length."""
    if not path or len(path) > MAX_PATH_LENGTH or "\0" in path:
        raise InvalidMessage(f"{field}: {path[:40]!r}, expected a path of 1 to {MAX_PATH_LENGTH} characters")
    return path


def _checked_address(address: str, field: str) -> str:
    host, separator, port = address.rpartition(":")
    if not (host and separator and port.isdecimal() and 0 < int(port) < 65536 and len(address) <= MAX_NAME_LENGTH):
        raise InvalidMessage(f"{field}: {address[:40]!r}, expected host:port")
    return address


def decode_load(message: controller_pb2.LoadReport) -> LoadSnapshot:
    """The load that a router counted. Raises InvalidMessage, naming the field."""
    if not 0 < message.window_s <= MAX_WINDOW_S:
        raise InvalidMessage(f"window_s: {message.window_s}, not within 0 and {MAX_WINDOW_S:g}")
    tokens: dict[ExpertId, int] = {}
    for entry in message.loads:
        if entry.expert.layer < 0 or entry.expert.index < 0:
            raise InvalidMessage("loads.expert: a negative layer or index")
        expert = ExpertId(layer=entry.expert.layer, index=entry.expert.index)
        if expert in tokens:
            raise InvalidMessage(f"loads.expert: {expert} is named twice")
        tokens[expert] = entry.assignments
    return LoadSnapshot(window_s=message.window_s, tokens=tokens)


def _decode_replica(
    message: controller_pb2.Replica, actors: dict[str, ActorAddress], layer_experts: dict[int, int]
) -> Replica:
    if not 0 <= message.expert.index < layer_experts.get(message.expert.layer, 0):
        raise InvalidMessage(
            f"replicas.expert: {message.expert.layer}/{message.expert.index} is not within layer_experts"
        )
    if message.actor not in actors:
        raise InvalidMessage(f"replicas.actor: {message.actor[:40]!r} is none of the actors")
    if not (math.isfinite(message.share) and 0 <= message.share <= 1 + SHARE_TOLERANCE):
        raise InvalidMessage(f"replicas.share: {message.share}, not within 0 and 1")
    expert = ExpertId(layer=message.expert.layer, index=message.expert.index)
    return Replica(expert=expert, actor=message.actor, share=message.share)


def _check_shares(replicas: tuple[Replica, ...]) -> None:
    total: dict[ExpertId, float] = defaultdict(float)
    seen: set[tuple[ExpertId, str]] = set()
    for replica in replicas:
        if (replica.expert, replica.actor) in seen:
            raise InvalidMessage(f"replicas: expert {replica.expert} stands twice on {replica.actor}")
        seen.add((replica.expert, replica.actor))
        total[replica.expert] += replica.share
    for expert, share in total.items():
        if abs(share - 1) > SHARE_TOLERANCE:
            raise InvalidMessage(f"replicas.share: those of expert {expert} sum to {share:g}, not 1")

"""Converts load counts (a router's report, a cluster's sums) to messages and back, with checks of what is received."""

from moecluster.errors import InvalidMessage
from moecluster.proto import controller_pb2
from moecluster.rpc.controller.placement_messages import checked_layer_experts
from moecluster.rpc.fields import (
    checked_amount,
    checked_count,
    checked_name,
    checked_names,
    checked_optional_name,
    decode_experts,
    encode_expert,
)
from moecluster.types import ActorLoads, ClusterLoads, LoadSnapshot


def encode_load(router: str, load: LoadSnapshot) -> controller_pb2.LoadReport:
    """Returns the message of what a router counted in a window."""
    return controller_pb2.LoadReport(
        router=router,
        loads=[
            controller_pb2.ExpertLoad(expert=encode_expert(expert), assignments=assignments)
            for expert, assignments in load.tokens.items()
        ],
    )


def decode_load(message: controller_pb2.LoadReport) -> LoadSnapshot:
    """Returns the load that a router counted. Raises InvalidMessage, naming the field."""
    experts = decode_experts([entry.expert for entry in message.loads], "loads.expert")
    counts = (entry.assignments for entry in message.loads)
    return LoadSnapshot(tokens=dict(zip(experts, counts, strict=True)))


def encode_cluster_loads(loads: ClusterLoads) -> controller_pb2.LoadsReply:
    """Returns the message of what was counted since the controller started."""
    return controller_pb2.LoadsReply(
        time_s=loads.time_s,
        routers=[
            controller_pb2.RouterLoads(
                router=router,
                layers=[controller_pb2.LayerLoads(layer=layer, assignments=counts) for layer, counts in layers.items()],
            )
            for router, layers in loads.tokens.items()
        ],
        actors=[
            controller_pb2.ActorLoads(
                actor=a.actor,
                node=a.node,
                computed_rows=a.computed_rows,
                busy_s=a.busy_s,
                speed=a.speed,
                slots=a.slots,
            )
            for a in loads.actors
        ],
        layer_experts=loads.layer_experts,
        expert_bytes=loads.expert_bytes,
        model=loads.model,
    )


def decode_cluster_loads(message: controller_pb2.LoadsReply) -> ClusterLoads:
    """Returns what was counted since the controller started. Raises InvalidMessage, naming the field."""
    layer_experts = checked_layer_experts(dict(message.layer_experts))
    if message.expert_bytes.keys() != layer_experts.keys():
        raise InvalidMessage("expert_bytes", "its layers are not those of layer_experts")
    tokens: dict[str, dict[int, tuple[int, ...]]] = {}
    for entry in message.routers:
        router = checked_name(entry.router, "routers.router")
        if router in tokens:
            raise InvalidMessage("routers.router", f"{router} is named twice")
        tokens[router] = _decode_layers(entry, layer_experts)
    names = checked_names((entry.actor for entry in message.actors), "actors.actor")
    return ClusterLoads(
        time_s=checked_amount(message.time_s, "time_s"),
        model=message.model,
        tokens=tokens,
        actors=tuple(_decode_actor(name, entry) for name, entry in zip(names, message.actors, strict=True)),
        layer_experts=layer_experts,
        expert_bytes={layer: checked_amount(size, "expert_bytes") for layer, size in message.expert_bytes.items()},
    )


def _decode_layers(message: controller_pb2.RouterLoads, layer_experts: dict[int, int]) -> dict[int, tuple[int, ...]]:
    layers: dict[int, tuple[int, ...]] = {}
    for entry in message.layers:
        if entry.layer in layers:
            raise InvalidMessage("routers.layers.layer", f"{entry.layer} is named twice")
        if len(entry.assignments) != layer_experts.get(entry.layer):
            raise InvalidMessage(
                "routers.layers.assignments",
                f"{len(entry.assignments)} counts of layer {entry.layer}, not one for each of its layer_experts",
            )
        layers[entry.layer] = tuple(entry.assignments)
    return layers


def _decode_actor(name: str, message: controller_pb2.ActorLoads) -> ActorLoads:
    speed = checked_amount(message.speed, "actors.speed")
    if not speed:
        raise InvalidMessage("actors.speed", "0, expected a positive number")
    return ActorLoads(
        actor=name,
        node=checked_optional_name(message.node, "actors.node"),
        computed_rows=message.computed_rows,
        busy_s=checked_amount(message.busy_s, "actors.busy_s"),
        speed=speed,
        slots=checked_count(message.slots, "actors.slots"),
    )

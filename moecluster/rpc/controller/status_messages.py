"""Converts the controller's status to a message and back, with checks of what is received."""

from moecluster.proto import controller_pb2
from moecluster.rpc.controller.operation_messages import decode_operation, encode_operation
from moecluster.rpc.fields import (
    MAX_REASON_LENGTH,
    checked_choice,
    checked_count,
    checked_name,
    checked_optional_address,
    checked_optional_name,
    decode_expert,
    encode_expert,
)
from moecluster.types import ActorPhase, ActorState, ControllerStatus, ProcessInfo, ReplicaAside, RouterState


def encode_status(status: ControllerStatus) -> controller_pb2.ControllerStatus:
    """Returns the message of the controller's status."""
    return controller_pb2.ControllerStatus(
        term=status.term,
        generation=status.generation,
        actors=[
            controller_pb2.ActorState(
                actor=a.actor,
                address=a.address,
                incarnation=a.incarnation,
                phase=a.phase.value,
                experts=a.experts,
                restarts=a.restarts,
                problem=a.problem[:MAX_REASON_LENGTH],
                process=_encode_process(a.process),
            )
            for a in status.actors
        ],
        checkpoint=status.checkpoint,
        routers=status.routers,
        policy=status.policy,
        held=status.held,
        replicas=status.replicas,
        cold_experts=status.cold_experts,
        operations=[encode_operation(operation) for operation in status.operations],
        router_states=[encode_router_state(state) for state in status.router_states],
        weight_version=status.weight_version,
        replicas_aside=[
            controller_pb2.ReplicaAside(
                actor=r.actor,
                expert=encode_expert(r.expert),
                state=r.state,
                problem=r.problem[:MAX_REASON_LENGTH],
                reports=r.reports,
            )
            for r in status.replicas_aside
        ],
        lost_experts=status.lost_experts,
        cluster=status.cluster,
        process=_encode_process(status.process),
    )


def decode_status(message: controller_pb2.ControllerStatus) -> ControllerStatus:
    """Returns the controller's status of a message. Raises InvalidMessage, naming the field."""
    return ControllerStatus(
        term=message.term,
        generation=message.generation,
        actors=tuple(_decode_actor(actor) for actor in message.actors),
        checkpoint=message.checkpoint,
        routers=checked_count(message.routers, "routers"),
        policy=message.policy,
        held=message.held,
        replicas=message.replicas,
        cold_experts=message.cold_experts,
        operations=tuple(decode_operation(operation) for operation in message.operations),
        router_states=tuple(decode_router_state(state) for state in message.router_states),
        weight_version=message.weight_version,
        lost_experts=message.lost_experts,
        cluster=checked_optional_name(message.cluster, "cluster"),
        process=_decode_process(message.process, "process"),
        replicas_aside=tuple(_decode_aside(replica) for replica in message.replicas_aside),
    )


def _decode_aside(message: controller_pb2.ReplicaAside) -> ReplicaAside:
    return ReplicaAside(
        actor=checked_name(message.actor, "replicas_aside.actor"),
        expert=decode_expert(message.expert, "replicas_aside.expert"),
        state=checked_name(message.state, "replicas_aside.state"),
        problem=message.problem[:MAX_REASON_LENGTH],
        reports=message.reports,
    )


def _decode_actor(message: controller_pb2.ActorState) -> ActorState:
    return ActorState(
        actor=checked_name(message.actor, "actors.actor"),
        address=checked_optional_address(message.address, "actors.address"),  # none: it is being started
        incarnation=checked_optional_name(message.incarnation, "actors.incarnation"),  # likewise
        phase=checked_choice(message.phase, ActorPhase, "actors.phase"),
        experts=checked_count(message.experts, "actors.experts"),
        restarts=message.restarts,
        problem=message.problem[:MAX_REASON_LENGTH],
        process=_decode_process(message.process, "actors.process"),
    )


def _encode_process(process: ProcessInfo) -> controller_pb2.Process:
    return controller_pb2.Process(
        pid=process.pid, node=process.node, metrics_address=process.metrics_address, nice=process.nice
    )


def _decode_process(message: controller_pb2.Process, field: str) -> ProcessInfo:
    return ProcessInfo(
        pid=checked_count(message.pid, f"{field}.pid"),
        node=checked_optional_name(message.node, f"{field}.node"),
        metrics_address=checked_optional_address(message.metrics_address, f"{field}.metrics_address"),
        nice=message.nice,
    )


def encode_router_state(state: RouterState) -> controller_pb2.RouterState:
    """Returns the message of a router's state."""
    return controller_pb2.RouterState(
        router=state.router,
        address=state.address,
        running=state.running,
        waiting=state.waiting,
        weight_version=state.weight_version,
        oldest_weight_version=state.oldest_weight_version,
        leaving=state.leaving,
        ready_weight_version=state.ready_weight_version,
        failed_weight_version=state.failed_weight_version,
        problem=state.problem[:MAX_REASON_LENGTH],
        process=_encode_process(state.process),
        inline_lanes=[lane[:MAX_REASON_LENGTH] for lane in state.inline_lanes],
    )


def decode_router_state(message: controller_pb2.RouterState) -> RouterState:
    """Returns a router's state, as the router or the controller reports it. Raises InvalidMessage, naming the field."""
    return RouterState(
        router=checked_name(message.router, "state.router"),
        address=checked_optional_address(message.address, "state.address"),
        running=checked_count(message.running, "state.running"),
        waiting=checked_count(message.waiting, "state.waiting"),
        weight_version=message.weight_version,
        oldest_weight_version=message.oldest_weight_version,
        leaving=message.leaving,
        ready_weight_version=message.ready_weight_version,
        failed_weight_version=message.failed_weight_version,
        problem=message.problem[:MAX_REASON_LENGTH],
        process=_decode_process(message.process, "state.process"),
        inline_lanes=tuple(lane[:MAX_REASON_LENGTH] for lane in message.inline_lanes),
    )

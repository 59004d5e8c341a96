"""Converts operations and plans to messages and back, with checks of what is received."""

import math

from moecluster.errors import InvalidMessage
from moecluster.proto import controller_pb2
from moecluster.rpc.controller.placement_messages import decode_replica, encode_replica
from moecluster.rpc.fields import checked_amount, checked_choice, checked_count, checked_name
from moecluster.types import Operation, OperationKind, OperationPhase, PlanPreview

UNKNOWN_VALUE = -1.0  # of a balancedness on the wire
NOT_ENDED = 0.0


def encode_operation(operation: Operation) -> controller_pb2.Operation:
    """Returns the message of an operation."""
    return controller_pb2.Operation(
        id=operation.id,
        kind=operation.kind.value,
        phase=operation.phase.value,
        reason=operation.reason,
        detail=operation.detail,
        arguments=operation.arguments,
        created_s=operation.created_s,
        ended_s=NOT_ENDED if operation.ended_s is None else operation.ended_s,
        balancedness_before=_or_unknown(operation.balancedness_before),
        balancedness_predicted=_or_unknown(operation.balancedness_predicted),
        balancedness_measured=_or_unknown(operation.balancedness_measured),
        moved_bytes=operation.moved_bytes,
        added_replicas=operation.added_replicas,
        removed_replicas=operation.removed_replicas,
    )


def decode_operation(message: controller_pb2.Operation) -> Operation:
    """Returns the operation of a message. Raises InvalidMessage, naming the field."""
    return Operation(
        id=checked_name(message.id, "id"),
        kind=checked_choice(message.kind, OperationKind, "kind"),
        phase=checked_choice(message.phase, OperationPhase, "phase"),
        reason=message.reason,
        detail=message.detail,
        arguments=tuple(message.arguments),
        created_s=checked_amount(message.created_s, "created_s"),
        ended_s=None if message.ended_s == NOT_ENDED else checked_amount(message.ended_s, "ended_s"),
        balancedness_before=_balancedness(message.balancedness_before, "balancedness_before"),
        balancedness_predicted=_balancedness(message.balancedness_predicted, "balancedness_predicted"),
        balancedness_measured=_balancedness(message.balancedness_measured, "balancedness_measured"),
        moved_bytes=message.moved_bytes,
        added_replicas=checked_count(message.added_replicas, "added_replicas"),
        removed_replicas=checked_count(message.removed_replicas, "removed_replicas"),
    )


def encode_operations(operations: tuple[Operation, ...]) -> controller_pb2.OperationList:
    """Returns the message of several operations, in their order."""
    return controller_pb2.OperationList(operations=[encode_operation(operation) for operation in operations])


def decode_operations(message: controller_pb2.OperationList) -> tuple[Operation, ...]:
    """Returns the operations of a message, in their order. Raises InvalidMessage, naming the field."""
    return tuple(decode_operation(operation) for operation in message.operations)


def encode_plan(plan: PlanPreview) -> controller_pb2.PlanReply:
    """Returns the message of what a policy would do."""
    return controller_pb2.PlanReply(
        policy=plan.policy,
        reason=plan.reason,
        balancedness_before=_or_unknown(plan.balancedness_before),
        balancedness_after=_or_unknown(plan.balancedness_after),
        moved_bytes=plan.moved_bytes,
        added=[encode_replica(replica) for replica in plan.added],
        removed=[encode_replica(replica) for replica in plan.removed],
        changed_shares=plan.changed_shares,
    )


def decode_plan(message: controller_pb2.PlanReply) -> PlanPreview:
    """Returns what a policy would do. Raises InvalidMessage, naming the field."""
    return PlanPreview(
        policy=checked_name(message.policy, "policy"),
        reason=message.reason,
        balancedness_before=_balancedness(message.balancedness_before, "balancedness_before"),
        balancedness_after=_balancedness(message.balancedness_after, "balancedness_after"),
        moved_bytes=checked_amount(message.moved_bytes, "moved_bytes"),
        added=tuple(decode_replica(replica, "added") for replica in message.added),
        removed=tuple(decode_replica(replica, "removed") for replica in message.removed),
        changed_shares=checked_count(message.changed_shares, "changed_shares"),
    )


def _or_unknown(balancedness: float | None) -> float:
    return UNKNOWN_VALUE if balancedness is None else balancedness


def _balancedness(value: float, field: str) -> float | None:
    if not math.isfinite(value):
        raise InvalidMessage(field, f"{value}, expected a finite number")
    return None if value < 0 else value

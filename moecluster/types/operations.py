"""Operations: the controller's changes of placement, weights or size."""

from dataclasses import dataclass
from enum import Enum, StrEnum


class OperationKind(StrEnum):
    """What an operation changes."""

    SCALE = "scale"  # the number of expert actors
    SCALE_ROUTERS = "scale-routers"  # the number of routers
    DRAIN = "drain"  # a node, or one expert actor, is emptied
    PLACE = "place"  # an expert is put on exactly the named actors, or on none
    UPDATE = "update"  # all weights are replaced
    ACTIVATE = "activate"  # cold experts that tokens need are loaded
    EVICT = "evict"  # experts that no token was routed to for long are unloaded
    HOLD = "hold"  # every expert gets one replica, for a training run
    RESTORE = "restore"  # experts that were lost, or returned NaN or infinity, are reloaded
    REBALANCE = "rebalance"  # replicas are added, moved or dropped to follow the load
    RESHARE = "reshare"  # shares alone follow the load

    @property
    def resumable(self) -> bool:
        """Whether a succeeding controller queues it again and carries it out from the beginning.

        Unfinished operations of the other kinds fail with their controller.
        """
        return self in _RESUMABLE

    @property
    def waits_for_actors(self) -> bool:
        """Whether it may wait for expert actors that are being started, and blocks automatic scaling meanwhile."""
        return self in (OperationKind.SCALE, OperationKind.DRAIN)


_RESUMABLE = frozenset(
    {
        OperationKind.SCALE,
        OperationKind.SCALE_ROUTERS,
        OperationKind.DRAIN,
        OperationKind.PLACE,
        OperationKind.UPDATE,
        OperationKind.ACTIVATE,
    }
)


class OperationPhase(Enum):
    """The progress of an operation."""

    QUEUED = "queued"
    PREPARING = "preparing"
    COMMITTING = "committing"
    DONE = "done"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (OperationPhase.DONE, OperationPhase.FAILED)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One change of placement, weights or size."""

    id: str
    kind: OperationKind
    phase: OperationPhase = OperationPhase.QUEUED
    reason: str
    detail: str = ""  # what is being done, or why it failed
    arguments: tuple[str, ...] = ()  # of the request: a number of actors, a node, an expert and its actors
    created_s: float  # Unix time, as ended_s
    ended_s: float | None = None
    balancedness_before: float | None = None
    balancedness_predicted: float | None = None
    balancedness_measured: float | None = None  # over the load window that followed
    moved_bytes: int = 0
    added_replicas: int = 0
    removed_replicas: int = 0

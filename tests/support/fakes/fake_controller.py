"""A fake controller: records what it receives, returns fixed answers, and refuses what the real one refuses."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from moecluster.errors import UserError
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import (
    ActorAddress,
    ActorLoads,
    ActorPhase,
    ActorState,
    ClusterLoads,
    ControllerStatus,
    ExpertId,
    LoadSnapshot,
    Operation,
    OperationKind,
    OperationPhase,
    Placement,
    PlacementNumber,
    PlanPreview,
    Replica,
    RouterState,
)

ACTORS = ("expert-0", "expert-1")
LAYER_EXPERTS = {0: 2, 3: 4}
MAX_ACTORS = 8
MAX_ROUTERS = 4
NOW_S = 1_700_000_000.0

LOADS = ClusterLoads(
    time_s=NOW_S,
    model="/models/tiny",
    tokens={"router": {0: (5, 0), 3: (1, 2, 3, 4)}},
    actors=tuple(
        ActorLoads(actor=actor, node="node-a", computed_rows=40, busy_s=0.5, speed=1.0, slots=3) for actor in ACTORS
    ),
    layer_experts=LAYER_EXPERTS,
    expert_bytes={0: 1024.0, 3: 2048.0},
)
PLAN = PlanPreview(
    policy="share",
    reason="expert 3/1 is hot",
    balancedness_before=0.6,
    balancedness_after=0.95,
    moved_bytes=2048.0,
    added=(Replica(expert=ExpertId(layer=3, index=1), actor="expert-0", share=0.5),),
    removed=(Replica(expert=ExpertId(layer=3, index=2), actor="expert-0"),),
    changed_shares=1,
)
OLD_OPERATION = Operation(
    id="rebalance-1",
    kind=OperationKind.REBALANCE,
    phase=OperationPhase.DONE,
    reason="expert 3/1 is hot",
    created_s=NOW_S,
    ended_s=NOW_S + 2.5,
    balancedness_before=0.6,
    balancedness_predicted=0.95,
    balancedness_measured=0.93,
    moved_bytes=4096,
    added_replicas=2,
    removed_replicas=1,
)


PLACEMENT = Placement(
    term=2,
    generation=5,
    layer_experts=LAYER_EXPERTS,
    actors={ACTORS[0]: ActorAddress(actor=ACTORS[0], address="127.0.0.1:5000", incarnation="a1", node="node-a")},
    replicas=(Replica(expert=ExpertId(layer=3, index=1), actor=ACTORS[0]),),
)


class FakeController(PlacementBoard):
    """A ControllerHandler, ready once a placement is published. Each query advances an operation by one phase."""

    lease_s = 0.3

    def __init__(self, *, fails: str = "") -> None:
        """fails: why every requested operation fails in the end; empty: they succeed."""
        super().__init__()
        self.renewals: list[tuple[str, PlacementNumber, bool]] = []
        self.states: dict[str, RouterState] = {}  # last reported by each router
        self.failures: list[tuple[str, str, str]] = []
        self.reports: list[LoadSnapshot] = []
        self.wanted: list[tuple[str, tuple[ExpertId, ...]]] = []
        self.planned: list[str] = []
        self.checkpoint = "/first"
        self.counted = LOADS
        self.nonfinite: list[tuple[str, str, ExpertId, PlacementNumber]] = []
        self.ended = False
        self.on_end: Callable[[], None] = lambda: None
        self._fails = fails
        self._operations = {OLD_OPERATION.id: OLD_OPERATION}

    def renew_lease(self, router: str, applied: PlacementNumber, *, hold: bool, state: RouterState) -> None:
        self.renewals.append((router, applied, hold))
        self.states[router] = state

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        self.failures.append((actor, incarnation, reason))

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        self.nonfinite.append((actor, incarnation, expert, placement))

    def report_load(self, router: str, load: LoadSnapshot) -> None:
        self.reports.append(load)

    def want_experts(self, router: str, experts: Sequence[ExpertId]) -> None:
        self.wanted.append((router, tuple(experts)))

    def set_checkpoint(self, checkpoint: str) -> None:
        if not checkpoint.startswith("/"):
            raise UserError(f"{checkpoint} is torn")
        self.checkpoint = checkpoint

    def status(self) -> ControllerStatus:
        return ControllerStatus(
            term=2,
            generation=5,
            actors=tuple(
                ActorState(
                    actor=actor,
                    address="127.0.0.1:5000",
                    incarnation="a1",
                    phase=ActorPhase.SERVING,
                    experts=3,
                    restarts=0,
                )
                for actor in ACTORS
            ),
            checkpoint=self.checkpoint,
            routers=1,
            policy="share",
            held=False,
            replicas=6,
            cold_experts=1,
            operations=tuple(o for o in self._operations.values() if not o.phase.ended),
            router_states=tuple(state for _, state in sorted(self.states.items())),
        )

    def loads(self) -> ClusterLoads:
        return self.counted

    def scale(self, expert_actors: int, *, operation_id: str) -> Operation:
        if expert_actors > MAX_ACTORS:
            raise UserError(f"{expert_actors} expert actors: at most {MAX_ACTORS} (cluster.max_expert_actors)")
        return self._begin(OperationKind.SCALE, (str(expert_actors),), operation_id)

    def scale_routers(self, routers: int, *, operation_id: str) -> Operation:
        if routers > MAX_ROUTERS:
            raise UserError(f"{routers} routers: at most {MAX_ROUTERS} (serve.max_routers)")
        return self._begin(OperationKind.SCALE_ROUTERS, (str(routers),), operation_id)

    def drain(self, node: str, *, operation_id: str) -> Operation:
        if node not in ("node-a", *ACTORS):
            raise UserError(f"{node} is neither a node nor an expert actor; there are node-a, {', '.join(ACTORS)}")
        return self._begin(OperationKind.DRAIN, (node,), operation_id)

    def place(self, expert: ExpertId, actors: Sequence[str], *, operation_id: str) -> Operation:
        if expert.index >= LAYER_EXPERTS.get(expert.layer, 0):
            raise UserError(f"{expert}: the model has no such expert")
        for actor in actors:
            if actor not in ACTORS:
                raise UserError(f"{actor} is no expert actor; there are {', '.join(ACTORS)}")
        return self._begin(OperationKind.PLACE, (str(expert), *actors), operation_id)

    def update(self, checkpoint: str, *, operation_id: str) -> Operation:
        if not checkpoint.startswith("/"):
            raise UserError(f"{checkpoint} is torn")
        return self._begin(OperationKind.UPDATE, (checkpoint,), operation_id)

    def plan(self, policy: str) -> PlanPreview:
        self.planned.append(policy)
        if policy not in ("", "share", "eplb"):
            raise UserError(f'policy "{policy}" is not known; there are share, eplb')
        return replace(PLAN, policy=policy or "share")

    def operation(self, operation_id: str) -> Operation:
        if operation_id not in self._operations:
            raise UserError(f"operation {operation_id} is not known; moecluster operations lists those that are")
        stands = self._operations[operation_id]
        if not stands.phase.ended:
            self._operations[operation_id] = self._further(stands)
        return stands

    def shut_down(self) -> None:
        self.ended = True
        self.on_end()

    def operations(self, limit: int) -> tuple[Operation, ...]:
        newest_first = tuple(reversed(self._operations.values()))
        return newest_first[:limit] if limit else newest_first

    def _begin(self, kind: OperationKind, arguments: tuple[str, ...], operation_id: str) -> Operation:
        operation_id = operation_id or f"{kind}-{len(self._operations) + 1}"
        known = self._operations.get(operation_id)
        if known is not None:
            if (known.kind, known.arguments) != (kind, arguments):
                raise UserError(f"operation {operation_id} asked for something else: {known.kind}")
            return known
        operation = Operation(id=operation_id, kind=kind, reason="asked for", arguments=arguments, created_s=NOW_S)
        self._operations[operation_id] = operation
        return operation

    def _further(self, operation: Operation) -> Operation:
        match operation.phase:
            case OperationPhase.QUEUED:
                return replace(operation, phase=OperationPhase.PREPARING, detail="loading 1 of 2")
            case OperationPhase.PREPARING:
                return replace(operation, phase=OperationPhase.COMMITTING)
            case _:
                phase = OperationPhase.FAILED if self._fails else OperationPhase.DONE
                return replace(operation, phase=phase, detail=self._fails, ended_s=NOW_S + 1.0)

"""Frozen records shared by all packages.

Shape letters, used as name suffixes everywhere: T tokens, D model width, F expert inner width, E experts of a layer,
K experts per token, L layers, R replicas, A expert actors, N unique rows in one message, P (row, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, NamedTuple

from moecluster.types.operations import Operation as Operation
from moecluster.types.operations import OperationKind as OperationKind
from moecluster.types.operations import OperationPhase as OperationPhase

if TYPE_CHECKING:  # the HTTP gateway, which only passes text on, starts without torch
    import torch


class Phase(Enum):
    """What an expert actor is asked to do with a batch."""

    FORWARD = "forward"
    TRAIN_FORWARD = "train_forward"
    BACKWARD = "backward"


@dataclass(frozen=True, kw_only=True, order=True)
class ExpertId:
    """One logical expert of the model."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}/{self.index}"


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """One MoE layer of a model, as its experts see it."""

    layer: int
    num_experts: int
    hidden_size: int  # width of the rows that the experts map; not always the model's own (NemotronH has a latent one)
    name: str  # qualified name of the experts module in the model


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One copy of an expert in one actor, and the share of the expert's tokens that it takes."""

    expert: ExpertId
    actor: str
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """The operating system's process of an actor, for operators."""

    pid: int = 0  # on its node; 0: not known
    node: str = ""  # the address of its node, as Ray knows it; empty: not known
    metrics_address: str = ""  # host:port of its /metrics; empty: it has none
    nice: int = 0  # its niceness


@dataclass(frozen=True, kw_only=True)
class ActorAddress:
    """The address of an expert actor, and its incarnation."""

    actor: str
    address: str  # host:port
    incarnation: str  # a new one at each start of the process
    node: str = ""  # which machine; empty: not known
    process: ProcessInfo = ProcessInfo()  # for the controller; not part of a placement


class PlacementNumber(NamedTuple):
    """Orders placements: by the controller's term, then by the number of placements it has published."""

    term: int
    generation: int


NO_PLACEMENT = PlacementNumber(term=0, generation=0)  # older than every placement


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which replicas are on which actors, and which weight versions requests use."""

    term: int
    generation: int
    layer_experts: Mapping[int, int]  # MoE layer -> its number of experts E, replicas or not
    actors: Mapping[str, ActorAddress]
    replicas: tuple[Replica, ...]
    held: bool = False  # nothing moves until the training runs that hold it have ended
    weight_version: int = 0  # for new requests
    checkpoint: str = ""  # the directory of that version
    next_weight_version: int = 0  # being prepared: routers load its trunk beside the current one; 0: none
    next_checkpoint: str = ""  # the directory of that version
    old_weight_version: int = 0  # that running requests may still use: routers keep its trunk; 0: none
    problem: str = ""  # why lost experts cannot be loaded; empty: they are being loaded, or none are lost

    @property
    def number(self) -> PlacementNumber:
        return PlacementNumber(self.term, self.generation)

    def replicas_of(self, expert: ExpertId) -> tuple[Replica, ...]:
        return tuple(r for r in self.replicas if r.expert == expert)

    def experts_on(self, actor: str) -> tuple[ExpertId, ...]:
        return tuple(sorted(r.expert for r in self.replicas if r.actor == actor))


@dataclass(frozen=True, kw_only=True)
class WeightVersion:
    """One version of all weights. Numbers grow from 1, and none is assigned twice."""

    version: int
    checkpoint: str  # a directory that holds all of it


@dataclass(frozen=True, kw_only=True, order=True)
class StepTag:
    """Identifies one attempt at one optimizer step; compared as (term, step, attempt)."""

    term: int
    step: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class MicroBatchTag:
    """Identifies the position of a training message inside an attempt."""

    step: StepTag
    rank: int = 0
    micro_batch: int = 0
    pass_index: int = 0  # counts forward calls of one layer in one micro-batch (gradient checkpointing repeats them)


@dataclass(frozen=True, kw_only=True)
class ComputeBatch:
    """One message of token rows to one expert actor.

    Pairs are ordered by expert, and rows ascend within an expert: expert experts[g] owns the next pair_counts[g] pairs.
    """

    request_id: int
    layer: int
    phase: Phase
    x_ND: torch.Tensor  # float32 | bfloat16 | float16
    experts: tuple[int, ...]  # ascending, distinct
    pair_counts: tuple[int, ...]  # as many; they sum to P
    pair_rows_P: torch.Tensor  # int32 in [0, N)
    pair_weights_P: torch.Tensor  # float32
    deadline_s: float  # seconds from now
    placement: PlacementNumber = NO_PLACEMENT  # by which the sender split the rows
    weight_version: int = 0
    train: MicroBatchTag | None = None  # of TRAIN_FORWARD and BACKWARD
    incarnation: str = ""  # if set, only this incarnation of the actor may answer
    grad_ND: torch.Tensor | None = None  # of BACKWARD
    unsummed: bool = False  # reply with every pair by itself (batch-invariant mode)


@dataclass(frozen=True, kw_only=True)
class ComputeResult:
    """What an expert actor returns for one ComputeBatch.

    FORWARD, TRAIN_FORWARD: y_ND (weighted partial sums), or y_PD (unweighted, per pair) when unsummed.
    BACKWARD: grad_x_ND and grad_w_P.
    """

    request_id: int
    y_ND: torch.Tensor | None = None
    y_PD: torch.Tensor | None = None
    grad_x_ND: torch.Tensor | None = None
    grad_w_P: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LoadSnapshot:
    """Assignments (token, expert) that a router counted since its last report."""

    tokens: Mapping[ExpertId, int]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Which optimizer an expert or a trunk is trained with. The learning rate comes with each Prepare."""

    name: str = "adamw"  # adamw | sgd
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0


@dataclass(frozen=True, kw_only=True, order=True)
class MessageKey:
    """Identifies one backward message to one actor inside an attempt."""

    rank: int
    micro_batch: int
    layer: int
    pass_index: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class ReduceResult:
    """A participant's answer to Reduce."""

    incarnation: str
    square_norm: float  # sum of squares of all gradients that the participant holds


@dataclass(frozen=True, kw_only=True)
class ActorWork:
    """What one incarnation of an expert actor has done since its start; a new incarnation counts from 0."""

    computed_rows: int = 0  # (row, expert) pairs
    expert_runs: int = 0  # executions of an expert, of any number of rows
    busy_s: float = 0.0  # computing
    batches: int = 0  # messages taken off the queue
    queue_wait_s: float = 0.0  # total wait of those
    queue_rows: int = 0  # waiting now


@dataclass(frozen=True, kw_only=True)
class ExpertActorStatus:
    """The status that an expert actor reports."""

    actor: str
    incarnation: str
    placement: PlacementNumber
    experts: tuple[ExpertId, ...]  # in the served version
    hosted_bytes: int  # of all versions
    weight_version: int  # the served version
    training_term: int
    committed: StepTag | None
    prepared: StepTag | None
    rss_bytes: int
    checkpoint: str = ""  # from the last set_placement
    snapshot: bytes = b""  # from the last set_placement, if requested
    work: ActorWork = field(default_factory=ActorWork)
    other_versions: Mapping[int, tuple[ExpertId, ...]] = field(default_factory=dict)  # beside the served one

    def held(self, version: int) -> tuple[ExpertId, ...]:
        """Returns the experts that the actor holds in a weight version."""
        return self.experts if version == self.weight_version else self.other_versions.get(version, ())


class ActorPhase(StrEnum):
    """An expert actor's progress towards serving."""

    RESTARTING = "restarting"  # its process is starting or restarting
    LOADING = "loading"  # it is loading its experts
    SERVING = "serving"


@dataclass(frozen=True, kw_only=True)
class ActorState:
    """What the controller knows of one expert actor."""

    actor: str
    address: str  # host:port; empty while it has none
    incarnation: str
    phase: ActorPhase
    experts: int
    restarts: int
    problem: str = ""  # why it does not serve; empty if unknown
    process: ProcessInfo = ProcessInfo()


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """What a router reports to the controller and to its clients."""

    router: str
    running: int = 0  # running requests
    waiting: int = 0  # waiting requests
    weight_version: int = 0  # of new requests; 0: not known yet


@dataclass(frozen=True, kw_only=True)
class RouterState(RouterReport):
    """What the controller knows of one router."""

    address: str = ""  # host:port of its RouterService; empty: it has none
    oldest_weight_version: int = 0  # that a running request still uses
    leaving: bool = False  # it should get no new requests
    ready_weight_version: int = 0  # the newest version whose trunk is loaded
    failed_weight_version: int = 0  # the version whose trunk could not be loaded; 0: none
    problem: str = ""  # why it could not
    process: ProcessInfo = ProcessInfo()
    inline_lanes: tuple[str, ...] = ()  # "ACTOR: why": rows that travel inline for want of memory to share


@dataclass(frozen=True, kw_only=True)
class ReplicaAside:
    """A replica that returned NaN or infinity to routers."""

    actor: str
    expert: ExpertId
    state: str  # reloading | reloaded | sick
    problem: str = ""
    reports: int = 0  # of routers


@dataclass(frozen=True, kw_only=True)
class ControllerStatus:
    """The cluster as the controller reports it."""

    term: int
    generation: int
    actors: tuple[ActorState, ...]
    checkpoint: str
    routers: int  # with a lease
    policy: str = ""
    held: bool = False
    replicas: int = 0
    cold_experts: int = 0  # without a replica on purpose
    operations: tuple[Operation, ...] = ()  # that have not ended
    router_states: tuple[RouterState, ...] = ()  # of those with a lease
    weight_version: int = 0
    replicas_aside: tuple[ReplicaAside, ...] = ()
    lost_experts: int = 0  # that no actor serves, except cold ones
    cluster: str = ""  # its name
    process: ProcessInfo = ProcessInfo()  # of the controller

    @property
    def is_degraded(self) -> bool:
        """Whether requests may wait or fail: an expert actor does not serve, or experts are lost."""
        return bool(self.lost_experts) or any(actor.phase is not ActorPhase.SERVING for actor in self.actors)


@dataclass(frozen=True, kw_only=True)
class PlanPreview:
    """What a policy would do now."""

    policy: str
    reason: str
    balancedness_before: float | None  # None: no token was counted yet
    balancedness_after: float | None
    moved_bytes: float
    added: tuple[Replica, ...]
    removed: tuple[Replica, ...]
    changed_shares: int  # replicas that stay where they are with another share


@dataclass(frozen=True, kw_only=True)
class ActorLoads:
    """One expert actor as the planner sees it."""

    actor: str
    node: str
    computed_rows: int
    busy_s: float
    speed: float  # relative to the usual speed, 1
    slots: int  # of each layer


@dataclass(frozen=True, kw_only=True)
class ClusterLoads:
    """What was counted since the controller started."""

    time_s: float  # Unix time
    model: str
    tokens: Mapping[str, Mapping[int, tuple[int, ...]]]  # router -> layer -> assignments per expert, since its start
    actors: tuple[ActorLoads, ...]
    layer_experts: Mapping[int, int]
    expert_bytes: Mapping[int, float]  # of one expert of the layer


@dataclass(frozen=True, kw_only=True)
class RouterStatus(RouterReport):
    """What a router answers its clients."""

    model: str
    placement: PlacementNumber
    rss_bytes: int
    max_tokens: int = 0  # of prompt and completion together
    controller: str = ""  # host:port of the controller that the router is connected to; empty: none now

from moecluster.proto import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("router", "applied_term", "applied_generation", "hold", "state")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    APPLIED_TERM_FIELD_NUMBER: _ClassVar[int]
    APPLIED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    router: str
    applied_term: int
    applied_generation: int
    hold: bool
    state: RouterState
    def __init__(self, router: _Optional[str] = ..., applied_term: _Optional[int] = ..., applied_generation: _Optional[int] = ..., hold: bool = ..., state: _Optional[_Union[RouterState, _Mapping]] = ...) -> None: ...

class RouterState(_message.Message):
    __slots__ = ("router", "address", "running", "waiting", "weight_version", "oldest_weight_version", "leaving", "ready_weight_version", "failed_weight_version", "problem", "process", "inline_lanes")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    OLDEST_WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    READY_WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    FAILED_WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    INLINE_LANES_FIELD_NUMBER: _ClassVar[int]
    router: str
    address: str
    running: int
    waiting: int
    weight_version: int
    oldest_weight_version: int
    leaving: bool
    ready_weight_version: int
    failed_weight_version: int
    problem: str
    process: Process
    inline_lanes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, router: _Optional[str] = ..., address: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., weight_version: _Optional[int] = ..., oldest_weight_version: _Optional[int] = ..., leaving: bool = ..., ready_weight_version: _Optional[int] = ..., failed_weight_version: _Optional[int] = ..., problem: _Optional[str] = ..., process: _Optional[_Union[Process, _Mapping]] = ..., inline_lanes: _Optional[_Iterable[str]] = ...) -> None: ...

class Process(_message.Message):
    __slots__ = ("pid", "node", "metrics_address", "nice")
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NICE_FIELD_NUMBER: _ClassVar[int]
    pid: int
    node: str
    metrics_address: str
    nice: int
    def __init__(self, pid: _Optional[int] = ..., node: _Optional[str] = ..., metrics_address: _Optional[str] = ..., nice: _Optional[int] = ...) -> None: ...

class ActorAddress(_message.Message):
    __slots__ = ("actor", "address", "incarnation", "node")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    actor: str
    address: str
    incarnation: str
    node: str
    def __init__(self, actor: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("expert", "actor", "share")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    expert: _tensor_pb2.ExpertRef
    actor: str
    share: float
    def __init__(self, expert: _Optional[_Union[_tensor_pb2.ExpertRef, _Mapping]] = ..., actor: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("term", "generation", "actors", "replicas", "lease_s", "layer_experts", "held", "weight_version", "checkpoint", "next_weight_version", "next_checkpoint", "old_weight_version", "problem")
    class LayerExpertsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    LAYER_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    NEXT_WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    OLD_WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    term: int
    generation: int
    actors: _containers.RepeatedCompositeFieldContainer[ActorAddress]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    lease_s: float
    layer_experts: _containers.ScalarMap[int, int]
    held: bool
    weight_version: int
    checkpoint: str
    next_weight_version: int
    next_checkpoint: str
    old_weight_version: int
    problem: str
    def __init__(self, term: _Optional[int] = ..., generation: _Optional[int] = ..., actors: _Optional[_Iterable[_Union[ActorAddress, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., lease_s: _Optional[float] = ..., layer_experts: _Optional[_Mapping[int, int]] = ..., held: bool = ..., weight_version: _Optional[int] = ..., checkpoint: _Optional[str] = ..., next_weight_version: _Optional[int] = ..., next_checkpoint: _Optional[str] = ..., old_weight_version: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class FailureReport(_message.Message):
    __slots__ = ("reporter", "actor", "incarnation", "reason", "nonfinite", "placement_term", "generation")
    REPORTER_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    reporter: str
    actor: str
    incarnation: str
    reason: str
    nonfinite: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ExpertRef]
    placement_term: int
    generation: int
    def __init__(self, reporter: _Optional[str] = ..., actor: _Optional[str] = ..., incarnation: _Optional[str] = ..., reason: _Optional[str] = ..., nonfinite: _Optional[_Iterable[_Union[_tensor_pb2.ExpertRef, _Mapping]]] = ..., placement_term: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class FailureReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("expert", "assignments")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    expert: _tensor_pb2.ExpertRef
    assignments: int
    def __init__(self, expert: _Optional[_Union[_tensor_pb2.ExpertRef, _Mapping]] = ..., assignments: _Optional[int] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("router", "loads")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    router: str
    loads: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    def __init__(self, router: _Optional[str] = ..., loads: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ...) -> None: ...

class LoadReportReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    def __init__(self, checkpoint: _Optional[str] = ...) -> None: ...

class SetCheckpointReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ControllerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ActorState(_message.Message):
    __slots__ = ("actor", "address", "incarnation", "phase", "experts", "restarts", "problem", "process")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    actor: str
    address: str
    incarnation: str
    phase: str
    experts: int
    restarts: int
    problem: str
    process: Process
    def __init__(self, actor: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[str] = ..., phase: _Optional[str] = ..., experts: _Optional[int] = ..., restarts: _Optional[int] = ..., problem: _Optional[str] = ..., process: _Optional[_Union[Process, _Mapping]] = ...) -> None: ...

class ControllerStatus(_message.Message):
    __slots__ = ("term", "generation", "actors", "checkpoint", "routers", "policy", "held", "replicas", "cold_experts", "operations", "router_states", "weight_version", "replicas_aside", "lost_experts", "cluster", "process")
    TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    COLD_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_STATES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_ASIDE_FIELD_NUMBER: _ClassVar[int]
    LOST_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    term: int
    generation: int
    actors: _containers.RepeatedCompositeFieldContainer[ActorState]
    checkpoint: str
    routers: int
    policy: str
    held: bool
    replicas: int
    cold_experts: int
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    router_states: _containers.RepeatedCompositeFieldContainer[RouterState]
    weight_version: int
    replicas_aside: _containers.RepeatedCompositeFieldContainer[ReplicaAside]
    lost_experts: int
    cluster: str
    process: Process
    def __init__(self, term: _Optional[int] = ..., generation: _Optional[int] = ..., actors: _Optional[_Iterable[_Union[ActorState, _Mapping]]] = ..., checkpoint: _Optional[str] = ..., routers: _Optional[int] = ..., policy: _Optional[str] = ..., held: bool = ..., replicas: _Optional[int] = ..., cold_experts: _Optional[int] = ..., operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ..., router_states: _Optional[_Iterable[_Union[RouterState, _Mapping]]] = ..., weight_version: _Optional[int] = ..., replicas_aside: _Optional[_Iterable[_Union[ReplicaAside, _Mapping]]] = ..., lost_experts: _Optional[int] = ..., cluster: _Optional[str] = ..., process: _Optional[_Union[Process, _Mapping]] = ...) -> None: ...

class ReplicaAside(_message.Message):
    __slots__ = ("actor", "expert", "state", "problem", "reports")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    actor: str
    expert: _tensor_pb2.ExpertRef
    state: str
    problem: str
    reports: int
    def __init__(self, actor: _Optional[str] = ..., expert: _Optional[_Union[_tensor_pb2.ExpertRef, _Mapping]] = ..., state: _Optional[str] = ..., problem: _Optional[str] = ..., reports: _Optional[int] = ...) -> None: ...

class WantRequest(_message.Message):
    __slots__ = ("router", "experts")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    router: str
    experts: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ExpertRef]
    def __init__(self, router: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[_tensor_pb2.ExpertRef, _Mapping]]] = ...) -> None: ...

class WantReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RouterLoads(_message.Message):
    __slots__ = ("router", "layers")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    router: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerLoads]
    def __init__(self, router: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerLoads, _Mapping]]] = ...) -> None: ...

class LayerLoads(_message.Message):
    __slots__ = ("layer", "assignments")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    assignments: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., assignments: _Optional[_Iterable[int]] = ...) -> None: ...

class ActorLoads(_message.Message):
    __slots__ = ("actor", "node", "computed_rows", "busy_s", "speed", "slots")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    actor: str
    node: str
    computed_rows: int
    busy_s: float
    speed: float
    slots: int
    def __init__(self, actor: _Optional[str] = ..., node: _Optional[str] = ..., computed_rows: _Optional[int] = ..., busy_s: _Optional[float] = ..., speed: _Optional[float] = ..., slots: _Optional[int] = ...) -> None: ...

class LoadsReply(_message.Message):
    __slots__ = ("time_s", "routers", "actors", "layer_experts", "expert_bytes", "model")
    class LayerExpertsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    class ExpertBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    LAYER_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    routers: _containers.RepeatedCompositeFieldContainer[RouterLoads]
    actors: _containers.RepeatedCompositeFieldContainer[ActorLoads]
    layer_experts: _containers.ScalarMap[int, int]
    expert_bytes: _containers.ScalarMap[int, float]
    model: str
    def __init__(self, time_s: _Optional[float] = ..., routers: _Optional[_Iterable[_Union[RouterLoads, _Mapping]]] = ..., actors: _Optional[_Iterable[_Union[ActorLoads, _Mapping]]] = ..., layer_experts: _Optional[_Mapping[int, int]] = ..., expert_bytes: _Optional[_Mapping[int, float]] = ..., model: _Optional[str] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("operation_id", "expert_actors", "routers")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ACTORS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    expert_actors: int
    routers: int
    def __init__(self, operation_id: _Optional[str] = ..., expert_actors: _Optional[int] = ..., routers: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("operation_id", "node")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    node: str
    def __init__(self, operation_id: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class PlaceRequest(_message.Message):
    __slots__ = ("operation_id", "expert", "actors")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    expert: _tensor_pb2.ExpertRef
    actors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, operation_id: _Optional[str] = ..., expert: _Optional[_Union[_tensor_pb2.ExpertRef, _Mapping]] = ..., actors: _Optional[_Iterable[str]] = ...) -> None: ...

class UpdateRequest(_message.Message):
    __slots__ = ("operation_id", "checkpoint")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    checkpoint: str
    def __init__(self, operation_id: _Optional[str] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class PlanReply(_message.Message):
    __slots__ = ("policy", "reason", "balancedness_before", "balancedness_after", "moved_bytes", "added", "removed", "changed_shares")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_AFTER_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_SHARES_FIELD_NUMBER: _ClassVar[int]
    policy: str
    reason: str
    balancedness_before: float
    balancedness_after: float
    moved_bytes: float
    added: _containers.RepeatedCompositeFieldContainer[Replica]
    removed: _containers.RepeatedCompositeFieldContainer[Replica]
    changed_shares: int
    def __init__(self, policy: _Optional[str] = ..., reason: _Optional[str] = ..., balancedness_before: _Optional[float] = ..., balancedness_after: _Optional[float] = ..., moved_bytes: _Optional[float] = ..., added: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., removed: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., changed_shares: _Optional[int] = ...) -> None: ...

class GetOperationRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListOperationsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OperationList(_message.Message):
    __slots__ = ("operations",)
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    def __init__(self, operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("id", "kind", "phase", "reason", "detail", "created_s", "ended_s", "balancedness_before", "balancedness_predicted", "balancedness_measured", "moved_bytes", "added_replicas", "removed_replicas", "arguments")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_S_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_PREDICTED_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_MEASURED_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADDED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    phase: str
    reason: str
    detail: str
    created_s: float
    ended_s: float
    balancedness_before: float
    balancedness_predicted: float
    balancedness_measured: float
    moved_bytes: int
    added_replicas: int
    removed_replicas: int
    arguments: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., phase: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., created_s: _Optional[float] = ..., ended_s: _Optional[float] = ..., balancedness_before: _Optional[float] = ..., balancedness_predicted: _Optional[float] = ..., balancedness_measured: _Optional[float] = ..., moved_bytes: _Optional[int] = ..., added_replicas: _Optional[int] = ..., removed_replicas: _Optional[int] = ..., arguments: _Optional[_Iterable[str]] = ...) -> None: ...

class ControllerSnapshot(_message.Message):
    __slots__ = ("actors", "leaving", "replica_layers", "replica_experts", "replica_actors", "replica_shares", "operations", "cold", "versions", "weight_version", "last_weight_version")
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    REPLICA_LAYERS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ACTORS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_SHARES_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    COLD_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    actors: _containers.RepeatedScalarFieldContainer[str]
    leaving: _containers.RepeatedScalarFieldContainer[str]
    replica_layers: _containers.RepeatedScalarFieldContainer[int]
    replica_experts: _containers.RepeatedScalarFieldContainer[int]
    replica_actors: _containers.RepeatedScalarFieldContainer[int]
    replica_shares: _containers.RepeatedScalarFieldContainer[float]
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    cold: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ExpertRef]
    versions: _containers.RepeatedCompositeFieldContainer[WeightVersion]
    weight_version: int
    last_weight_version: int
    def __init__(self, actors: _Optional[_Iterable[str]] = ..., leaving: _Optional[_Iterable[str]] = ..., replica_layers: _Optional[_Iterable[int]] = ..., replica_experts: _Optional[_Iterable[int]] = ..., replica_actors: _Optional[_Iterable[int]] = ..., replica_shares: _Optional[_Iterable[float]] = ..., operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ..., cold: _Optional[_Iterable[_Union[_tensor_pb2.ExpertRef, _Mapping]]] = ..., versions: _Optional[_Iterable[_Union[WeightVersion, _Mapping]]] = ..., weight_version: _Optional[int] = ..., last_weight_version: _Optional[int] = ...) -> None: ...

class WeightVersion(_message.Message):
    __slots__ = ("version", "checkpoint")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    version: int
    checkpoint: str
    def __init__(self, version: _Optional[int] = ..., checkpoint: _Optional[str] = ...) -> None: ...

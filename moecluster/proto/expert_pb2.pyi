from moecluster.proto import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    FORWARD: _ClassVar[Phase]
    TRAIN_FORWARD: _ClassVar[Phase]
    BACKWARD: _ClassVar[Phase]

class ReplyCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLY_UNSPECIFIED: _ClassVar[ReplyCode]
    OK: _ClassVar[ReplyCode]
    NOT_HOSTED: _ClassVar[ReplyCode]
    INVALID_ARGUMENT: _ClassVar[ReplyCode]
    RESOURCE_EXHAUSTED: _ClassVar[ReplyCode]
    STALE: _ClassVar[ReplyCode]
    DEADLINE_EXCEEDED: _ClassVar[ReplyCode]
    INTERNAL: _ClassVar[ReplyCode]
    ABORTED: _ClassVar[ReplyCode]
    STATE_LOST: _ClassVar[ReplyCode]
    UNAVAILABLE: _ClassVar[ReplyCode]
PHASE_UNSPECIFIED: Phase
FORWARD: Phase
TRAIN_FORWARD: Phase
BACKWARD: Phase
REPLY_UNSPECIFIED: ReplyCode
OK: ReplyCode
NOT_HOSTED: ReplyCode
INVALID_ARGUMENT: ReplyCode
RESOURCE_EXHAUSTED: ReplyCode
STALE: ReplyCode
DEADLINE_EXCEEDED: ReplyCode
INTERNAL: ReplyCode
ABORTED: ReplyCode
STATE_LOST: ReplyCode
UNAVAILABLE: ReplyCode

class ComputeRequest(_message.Message):
    __slots__ = ("hello", "batch")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    batch: Batch
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class ComputeReply(_message.Message):
    __slots__ = ("hello", "batch")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    hello: HelloReply
    batch: BatchReply
    def __init__(self, hello: _Optional[_Union[HelloReply, _Mapping]] = ..., batch: _Optional[_Union[BatchReply, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router", "segment")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    router: str
    segment: _tensor_pb2.SegmentOffer
    def __init__(self, router: _Optional[str] = ..., segment: _Optional[_Union[_tensor_pb2.SegmentOffer, _Mapping]] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("incarnation", "nonce", "segment", "shortage")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    SHORTAGE_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    nonce: bytes
    segment: _tensor_pb2.SegmentOffer
    shortage: str
    def __init__(self, incarnation: _Optional[str] = ..., nonce: _Optional[bytes] = ..., segment: _Optional[_Union[_tensor_pb2.SegmentOffer, _Mapping]] = ..., shortage: _Optional[str] = ...) -> None: ...

class StepTag(_message.Message):
    __slots__ = ("term", "step", "attempt")
    TERM_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    term: int
    step: int
    attempt: int
    def __init__(self, term: _Optional[int] = ..., step: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("request_id", "placement_term", "generation", "layer", "phase", "weight_version", "deadline_s", "incarnation", "unsummed", "step", "rank", "micro_batch", "pass_index", "x", "experts", "expert_pairs", "pair_rows", "pair_weights", "grad", "released", "segment_nonce")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    UNSUMMED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    PASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_PAIRS_FIELD_NUMBER: _ClassVar[int]
    PAIR_ROWS_FIELD_NUMBER: _ClassVar[int]
    PAIR_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    GRAD_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_NONCE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    placement_term: int
    generation: int
    layer: int
    phase: Phase
    weight_version: int
    deadline_s: float
    incarnation: str
    unsummed: bool
    step: StepTag
    rank: int
    micro_batch: int
    pass_index: int
    x: _tensor_pb2.Tensor
    experts: _containers.RepeatedScalarFieldContainer[int]
    expert_pairs: _containers.RepeatedScalarFieldContainer[int]
    pair_rows: _tensor_pb2.Tensor
    pair_weights: _tensor_pb2.Tensor
    grad: _tensor_pb2.Tensor
    released: _containers.RepeatedScalarFieldContainer[int]
    segment_nonce: bytes
    def __init__(self, request_id: _Optional[int] = ..., placement_term: _Optional[int] = ..., generation: _Optional[int] = ..., layer: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., weight_version: _Optional[int] = ..., deadline_s: _Optional[float] = ..., incarnation: _Optional[str] = ..., unsummed: bool = ..., step: _Optional[_Union[StepTag, _Mapping]] = ..., rank: _Optional[int] = ..., micro_batch: _Optional[int] = ..., pass_index: _Optional[int] = ..., x: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., experts: _Optional[_Iterable[int]] = ..., expert_pairs: _Optional[_Iterable[int]] = ..., pair_rows: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., pair_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., grad: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., released: _Optional[_Iterable[int]] = ..., segment_nonce: _Optional[bytes] = ...) -> None: ...

class BatchReply(_message.Message):
    __slots__ = ("request_id", "code", "detail", "placement_term", "generation", "y", "grad_x", "grad_w")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    GRAD_X_FIELD_NUMBER: _ClassVar[int]
    GRAD_W_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    code: ReplyCode
    detail: str
    placement_term: int
    generation: int
    y: _tensor_pb2.Tensor
    grad_x: _tensor_pb2.Tensor
    grad_w: _tensor_pb2.Tensor
    def __init__(self, request_id: _Optional[int] = ..., code: _Optional[_Union[ReplyCode, str]] = ..., detail: _Optional[str] = ..., placement_term: _Optional[int] = ..., generation: _Optional[int] = ..., y: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., grad_x: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., grad_w: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class OptimizerSettings(_message.Message):
    __slots__ = ("name", "beta1", "beta2", "eps", "weight_decay", "momentum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    momentum: float
    def __init__(self, name: _Optional[str] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., momentum: _Optional[float] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("term", "experts", "checkpoint", "dtype", "weight_version", "optimizer", "replace", "training_term", "timeout_s", "peer_address", "peer_incarnation", "max_bytes_per_s")
    TERM_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    TRAINING_TERM_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PEER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    term: int
    experts: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ExpertRef]
    checkpoint: str
    dtype: str
    weight_version: int
    optimizer: OptimizerSettings
    replace: bool
    training_term: int
    timeout_s: float
    peer_address: str
    peer_incarnation: str
    max_bytes_per_s: int
    def __init__(self, term: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[_tensor_pb2.ExpertRef, _Mapping]]] = ..., checkpoint: _Optional[str] = ..., dtype: _Optional[str] = ..., weight_version: _Optional[int] = ..., optimizer: _Optional[_Union[OptimizerSettings, _Mapping]] = ..., replace: bool = ..., training_term: _Optional[int] = ..., timeout_s: _Optional[float] = ..., peer_address: _Optional[str] = ..., peer_incarnation: _Optional[str] = ..., max_bytes_per_s: _Optional[int] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("loaded_bytes",)
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    loaded_bytes: int
    def __init__(self, loaded_bytes: _Optional[int] = ...) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("term", "experts", "drain_timeout_s")
    TERM_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    term: int
    experts: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ExpertRef]
    drain_timeout_s: float
    def __init__(self, term: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[_tensor_pb2.ExpertRef, _Mapping]]] = ..., drain_timeout_s: _Optional[float] = ...) -> None: ...

class UnloadReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetPlacementRequest(_message.Message):
    __slots__ = ("term", "generation", "checkpoint", "snapshot", "weight_version", "weight_versions")
    TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    term: int
    generation: int
    checkpoint: str
    snapshot: bytes
    weight_version: int
    weight_versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, term: _Optional[int] = ..., generation: _Optional[int] = ..., checkpoint: _Optional[str] = ..., snapshot: _Optional[bytes] = ..., weight_version: _Optional[int] = ..., weight_versions: _Optional[_Iterable[int]] = ...) -> None: ...

class SetPlacementReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("experts", "with_optimizer", "step", "incarnation", "weight_version")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WITH_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ExpertRef]
    with_optimizer: bool
    step: int
    incarnation: str
    weight_version: int
    def __init__(self, experts: _Optional[_Iterable[_Union[_tensor_pb2.ExpertRef, _Mapping]]] = ..., with_optimizer: bool = ..., step: _Optional[int] = ..., incarnation: _Optional[str] = ..., weight_version: _Optional[int] = ...) -> None: ...

class ExportChunk(_message.Message):
    __slots__ = ("expert", "name", "dtype", "shape", "offset_bytes", "content", "crc32", "weight_version")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    expert: _tensor_pb2.ExpertRef
    name: str
    dtype: _tensor_pb2.DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset_bytes: int
    content: bytes
    crc32: int
    weight_version: int
    def __init__(self, expert: _Optional[_Union[_tensor_pb2.ExpertRef, _Mapping]] = ..., name: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., offset_bytes: _Optional[int] = ..., content: _Optional[bytes] = ..., crc32: _Optional[int] = ..., weight_version: _Optional[int] = ...) -> None: ...

class MessageKey(_message.Message):
    __slots__ = ("rank", "micro_batch", "layer", "pass_index", "rows")
    RANK_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    micro_batch: int
    layer: int
    pass_index: int
    rows: int
    def __init__(self, rank: _Optional[int] = ..., micro_batch: _Optional[int] = ..., layer: _Optional[int] = ..., pass_index: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class ReduceRequest(_message.Message):
    __slots__ = ("step", "expected")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    step: StepTag
    expected: _containers.RepeatedCompositeFieldContainer[MessageKey]
    def __init__(self, step: _Optional[_Union[StepTag, _Mapping]] = ..., expected: _Optional[_Iterable[_Union[MessageKey, _Mapping]]] = ...) -> None: ...

class ReduceReply(_message.Message):
    __slots__ = ("incarnation", "square_norm")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SQUARE_NORM_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    square_norm: float
    def __init__(self, incarnation: _Optional[str] = ..., square_norm: _Optional[float] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("step", "clip_scale", "learning_rate")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLIP_SCALE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    step: StepTag
    clip_scale: float
    learning_rate: float
    def __init__(self, step: _Optional[_Union[StepTag, _Mapping]] = ..., clip_scale: _Optional[float] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class PrepareReply(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    def __init__(self, incarnation: _Optional[str] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: StepTag
    def __init__(self, step: _Optional[_Union[StepTag, _Mapping]] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    def __init__(self, incarnation: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: StepTag
    def __init__(self, step: _Optional[_Union[StepTag, _Mapping]] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("training_term", "with_snapshot")
    TRAINING_TERM_FIELD_NUMBER: _ClassVar[int]
    WITH_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    training_term: int
    with_snapshot: bool
    def __init__(self, training_term: _Optional[int] = ..., with_snapshot: bool = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("actor", "incarnation", "placement_term", "generation", "experts", "hosted_bytes", "weight_version", "training_term", "committed", "prepared", "rss_bytes", "checkpoint", "snapshot", "computed_rows", "busy_s", "batches", "queue_wait_s", "queue_rows", "expert_runs", "other_versions")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    HOSTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRAINING_TERM_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_ROWS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_RUNS_FIELD_NUMBER: _ClassVar[int]
    OTHER_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    actor: str
    incarnation: str
    placement_term: int
    generation: int
    experts: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ExpertRef]
    hosted_bytes: int
    weight_version: int
    training_term: int
    committed: StepTag
    prepared: StepTag
    rss_bytes: int
    checkpoint: str
    snapshot: bytes
    computed_rows: int
    busy_s: float
    batches: int
    queue_wait_s: float
    queue_rows: int
    expert_runs: int
    other_versions: _containers.RepeatedCompositeFieldContainer[HeldVersion]
    def __init__(self, actor: _Optional[str] = ..., incarnation: _Optional[str] = ..., placement_term: _Optional[int] = ..., generation: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[_tensor_pb2.ExpertRef, _Mapping]]] = ..., hosted_bytes: _Optional[int] = ..., weight_version: _Optional[int] = ..., training_term: _Optional[int] = ..., committed: _Optional[_Union[StepTag, _Mapping]] = ..., prepared: _Optional[_Union[StepTag, _Mapping]] = ..., rss_bytes: _Optional[int] = ..., checkpoint: _Optional[str] = ..., snapshot: _Optional[bytes] = ..., computed_rows: _Optional[int] = ..., busy_s: _Optional[float] = ..., batches: _Optional[int] = ..., queue_wait_s: _Optional[float] = ..., queue_rows: _Optional[int] = ..., expert_runs: _Optional[int] = ..., other_versions: _Optional[_Iterable[_Union[HeldVersion, _Mapping]]] = ...) -> None: ...

class HeldVersion(_message.Message):
    __slots__ = ("version", "experts")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    experts: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ExpertRef]
    def __init__(self, version: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[_tensor_pb2.ExpertRef, _Mapping]]] = ...) -> None: ...

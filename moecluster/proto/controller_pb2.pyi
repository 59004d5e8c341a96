from moecluster.proto import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("router", "applied_term", "applied_generation")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    APPLIED_TERM_FIELD_NUMBER: _ClassVar[int]
    APPLIED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    router: str
    applied_term: int
    applied_generation: int
    def __init__(self, router: _Optional[str] = ..., applied_term: _Optional[int] = ..., applied_generation: _Optional[int] = ...) -> None: ...

class ActorAddress(_message.Message):
    __slots__ = ("actor", "address", "incarnation")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    actor: str
    address: str
    incarnation: str
    def __init__(self, actor: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("term", "generation", "actors", "replicas", "lease_s", "layer_experts")
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
    term: int
    generation: int
    actors: _containers.RepeatedCompositeFieldContainer[ActorAddress]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    lease_s: float
    layer_experts: _containers.ScalarMap[int, int]
    def __init__(self, term: _Optional[int] = ..., generation: _Optional[int] = ..., actors: _Optional[_Iterable[_Union[ActorAddress, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., lease_s: _Optional[float] = ..., layer_experts: _Optional[_Mapping[int, int]] = ...) -> None: ...

class FailureReport(_message.Message):
    __slots__ = ("reporter", "actor", "incarnation", "reason")
    REPORTER_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    reporter: str
    actor: str
    incarnation: str
    reason: str
    def __init__(self, reporter: _Optional[str] = ..., actor: _Optional[str] = ..., incarnation: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("router", "window_s", "loads")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    router: str
    window_s: float
    loads: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    def __init__(self, router: _Optional[str] = ..., window_s: _Optional[float] = ..., loads: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ...) -> None: ...

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
    __slots__ = ("actor", "address", "incarnation", "phase", "experts", "restarts")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    actor: str
    address: str
    incarnation: str
    phase: str
    experts: int
    restarts: int
    def __init__(self, actor: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[str] = ..., phase: _Optional[str] = ..., experts: _Optional[int] = ..., restarts: _Optional[int] = ...) -> None: ...

class ControllerStatus(_message.Message):
    __slots__ = ("term", "generation", "actors", "checkpoint", "routers")
    TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    term: int
    generation: int
    actors: _containers.RepeatedCompositeFieldContainer[ActorState]
    checkpoint: str
    routers: int
    def __init__(self, term: _Optional[int] = ..., generation: _Optional[int] = ..., actors: _Optional[_Iterable[_Union[ActorState, _Mapping]]] = ..., checkpoint: _Optional[str] = ..., routers: _Optional[int] = ...) -> None: ...

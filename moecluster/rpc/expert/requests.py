"""What a controller or a training run asks of an expert actor, as records that all implementations take."""

from dataclasses import dataclass

from moecluster.types import ActorAddress, ExpertId, OptimizerSettings


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """Experts that an actor shall hold, and where their weights come from."""

    term: int  # of the controller
    experts: tuple[ExpertId, ...]
    checkpoint: str  # a directory; also of a copy from a peer: it says what the model's experts are
    dtype: str = ""  # float32 | bfloat16 | float16; empty: float32
    weight_version: int = 0  # 0: the one that the actor serves, or if it serves nothing, the peer
    optimizer: OptimizerSettings | None = None  # None: the experts are served, not trained
    replace: bool = False  # also load what the actor already holds in that version
    training_term: int = 0  # with an optimizer: fences training requests
    timeout_s: float = 60.0
    peer: ActorAddress | None = None  # an actor to copy the weights from; None: they are read from the checkpoint
    max_bytes_per_s: int = 0  # of a copy from a peer; 0: no limit


@dataclass(frozen=True, kw_only=True)
class PlacementNotice:
    """The current placement, and what an actor keeps for the controller's successor."""

    term: int
    generation: int
    checkpoint: str = ""  # what a lost expert is loaded from
    snapshot: bytes = b""  # for the successor, at most MAX_SNAPSHOT_BYTES; empty: the last one stays
    weight_version: int = 0  # what a batch without a version means; 0: not said
    weight_versions: tuple[int, ...] = ()  # those in use: the actor drops experts of others; empty: not said

"""The requests of a controller or a training run to an expert actor, as records that all implementations take."""

from dataclasses import dataclass

from moecluster.types import ActorAddress, ExpertId, OptimizerSettings


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """The experts to load, and the source of their weights."""

    term: int  # of the controller
    experts: tuple[ExpertId, ...]
    checkpoint: str  # a directory; needed for a copy from a peer too: it describes the model's experts
    dtype: str = ""  # float32 | bfloat16 | float16; empty: float32
    weight_version: int = 0  # 0: the one that the actor serves; if it serves none, the peer's
    optimizer: OptimizerSettings | None = None  # None: the experts are served, not trained
    replace: bool = False  # also load what the actor already holds in that version
    training_term: int = 0  # with an optimizer: fences training requests
    timeout_s: float = 60.0
    peer: ActorAddress | None = None  # an actor to copy the weights from; None: read the checkpoint
    max_bytes_per_s: int = 0  # of a copy from a peer; 0: no limit


@dataclass(frozen=True, kw_only=True)
class PlacementNotice:
    """The current placement, and data that an actor keeps for the controller's successor."""

    term: int
    generation: int
    checkpoint: str = ""  # for reloading lost experts
    snapshot: bytes = b""  # for the successor, at most MAX_SNAPSHOT_BYTES; empty: keep the last one
    weight_version: int = 0  # for batches that name no version; 0: unspecified
    weight_versions: tuple[int, ...] = ()  # those in use: the actor drops experts of others; empty: unspecified

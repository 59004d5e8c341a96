"""Settings of the section [experts]."""

from dataclasses import dataclass
from typing import ClassVar

from moecluster.config.fields import MIB, Section, setting


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Section):
    """How an expert actor computes and trains its experts."""

    section: ClassVar[str] = "experts"

    optimizer: str = setting(
        "adamw",
        "Optimizer of trunk and experts. The state of an expert's parameters lives with the expert.",
        choices=("adamw", "sgd"),
    )
    momentum: float = setting(0.0, "Momentum of sgd. adamw ignores it.", minimum=0, below=1)
    batch_invariant: bool = setting(
        False, "Make the outputs of an MoE layer bit for bit independent of the batch. Slower for medium batches."
    )
    activation_budget_bytes: int = setting(
        256 * MIB,
        "Activations that an expert actor keeps for the backward pass; what does not fit is recomputed. 0: "
        "everything is recomputed.",
        minimum=0,
    )
    max_queue_bytes: int = setting(
        256 * MIB,
        "Rows that may wait in an expert actor. Messages beyond it are refused, and routers send them again.",
        minimum=MIB,
    )
    threads: int = setting(1, "Compute threads of each expert actor.", minimum=1)

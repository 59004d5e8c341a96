"""Settings of the section [train]."""

from dataclasses import dataclass
from typing import ClassVar

from moecluster.config.fields import Section, setting


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """One training run."""

    section: ClassVar[str] = "train"

    data: str = setting(
        "stdlib", "Training text: a file, a directory, or stdlib (Python source and prose that comes with Python)."
    )
    tokenizer: str = setting(
        "", "Tokenizer directory. Empty: the tokenizer of model.path, or bytes if that is empty too."
    )
    max_skipped_share: float = setting(
        0.1,
        "Fraction of a text directory's bytes that may be skipped because they are not UTF-8 text.",
        minimum=0,
        maximum=1,
    )
    output_dir: str = setting(
        "runs/moecluster",
        "Directory of checkpoints and plots. In a Ray job a relative path lies below the home directory.",
    )
    steps: int = setting(300, "Optimizer steps.", minimum=1)
    batch_size: int = setting(16, "Sequences per step, over all micro-batches.", minimum=1)
    micro_batches: int = setting(1, "Micro-batches per step. Must divide batch_size.", minimum=1)
    sequence_length: int = setting(128, "Tokens per sequence. At most model.max_positions.", minimum=2)
    lr: float = setting(1e-3, "Peak learning rate.", above=0)
    warmup_steps: int = setting(20, "Steps of linear learning-rate warm-up. 0: none.", minimum=0)
    min_lr_ratio: float = setting(
        0.1, "Final learning rate of the cosine schedule, as a fraction of lr.", minimum=0, maximum=1
    )
    weight_decay: float = setting(0.1, "Decoupled weight decay of weight matrices.", minimum=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "Decay rates of adamw: beta1 and beta2.", minimum=0, below=1)
    eps: float = setting(1e-8, "Epsilon of adamw.", above=0)
    max_grad_norm: float = setting(
        1.0, "Gradients are clipped to this norm, taken over trunk and experts together. 0: no clipping.", minimum=0
    )
    seed: int = setting(0, "Seed of the initial parameters, the order of the data and the gates.", minimum=0)
    durability: str = setting(
        "checkpoint",
        "When state is lost: go back to the last checkpoint (checkpoint), or fail (none).",
        choices=("checkpoint", "none"),
    )
    checkpoint_every_steps: int = setting(100, "Steps between checkpoints. 0: only after the last step.", minimum=0)
    keep_checkpoints: int = setting(2, "Checkpoints to keep. Older ones are deleted.", minimum=1)
    max_restarts: int = setting(
        3,
        "How often the run restarts from its last checkpoint after its router was lost; only with durability = "
        "checkpoint.",
        minimum=0,
    )
    participant_timeout_s: float = setting(
        5.0, "How long a training step retries an actor that does not respond before it counts as lost.", above=0
    )
    checkpoint_errors: str = setting(
        "stop",
        "When a checkpoint or the history of a run cannot be written, as on a full disk: stop the run, or continue.",
        choices=("stop", "continue"),
    )
    resume: bool = setting(False, "Resume from the last checkpoint in output_dir if there is one.")
    eval_every_steps: int = setting(50, "Steps between evaluations. 0: only after the last step.", minimum=0)
    eval_batches: int = setting(8, "Batches per evaluation.", minimum=1)

    def check(self) -> None:
        if self.batch_size % self.micro_batches:
            raise self.complain("micro_batches", f"expected a divisor of batch_size = {self.batch_size}")

"""The learning rate of each step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up to lr, then half a cosine down to min_lr_ratio * lr at the last step (Loshchilov, Hutter 2017)."""

    lr: float
    steps: int
    warmup_steps: int
    min_lr_ratio: float

    def at(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 1. The last warm-up step has the full lr."""
        assert step >= 1
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        floor = self.lr * self.min_lr_ratio
        return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))

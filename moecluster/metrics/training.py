"""Metrics of training."""

from collections.abc import Mapping

from moecluster.metrics.buckets import STEP_BUCKETS_S
from moecluster.metrics.declare import Declarations, MetricGroup


class TrainingMetrics(MetricGroup):
    """Set by the process that runs the training loop."""

    def __init__(self, declare: Declarations) -> None:
        super().__init__(declare)
        self._train_loss = declare.gauge(
            "train_loss", "Cross-entropy of the last committed step in nats per token, without auxiliary losses"
        )
        self._train_aux_loss = declare.gauge(
            "train_aux_loss",
            "Auxiliary loss of the last committed step, times its coefficient, over all layers; not part of train_loss",
            "loss",
        )
        self._aux_losses: set[str] = set()
        self._train_step = declare.histogram("train_step_seconds", "Duration of a committed step", STEP_BUCKETS_S)
        self._train_replays = declare.counter("train_step_replays", "Attempts of training steps that were run again")

    def observe_train_step(self, *, loss: float, aux_losses: Mapping[str, float], seconds: float) -> None:
        """Adds a committed step. loss: cross-entropy, nats per token. aux_losses: name -> loss with its coefficient."""
        self._train_loss.labels(*self._common).set(loss)
        for name in self._aux_losses - aux_losses.keys():
            self._train_aux_loss.remove(*self._common, name)
        for name, value in aux_losses.items():
            self._train_aux_loss.labels(*self._common, name).set(value)
        self._aux_losses = set(aux_losses)
        self._train_step.labels(*self._common).observe(seconds)

    def count_replay(self) -> None:
        """Adds an attempt that repeats a training step."""
        self._train_replays.labels(*self._common).inc()

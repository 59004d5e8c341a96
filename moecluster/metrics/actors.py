"""Metrics of expert actors."""

from collections.abc import Callable, Mapping

from moecluster.metrics.declare import Declarations, MetricGroup, children


class ActorMetrics(MetricGroup):
    """Set by expert actors, and by the controller, which measures their speeds."""

    def __init__(self, declare: Declarations) -> None:
        super().__init__(declare)
        self._actor_tokens = children(
            declare.counter("actor_tokens", "Pairs (row, expert) computed by an expert actor", "actor"), declare.common
        )
        self._actor_runs = children(
            declare.counter("actor_expert_runs", "Expert computations, one per expert and merged batch", "actor"),
            declare.common,
        )
        self._actor_queue_rows = declare.gauge("actor_queue_rows", "Rows waiting in an expert actor's queue", "actor")
        self._actor_busy = children(
            declare.counter("actor_busy_seconds", "Time an expert actor spent computing", "actor"), declare.common
        )
        self._actor_speed = declare.gauge(
            "actor_speed", "Relative speed that the planner assumes; 1 is typical", "actor"
        )
        self._measured_actors: set[str] = set()

    def count_computed(self, actor: str, *, pairs: int, runs: int, busy_s: float) -> None:
        """Adds a computed batch: its (row, expert) pairs, and the expert runs that they needed."""
        self._actor_tokens(actor).inc(pairs)
        self._actor_runs(actor).inc(runs)
        self._actor_busy(actor).inc(busy_s)

    def watch_queue(self, actor: str, rows: Callable[[], int]) -> None:
        """Shows the rows that wait in an actor's queue; the function is called when /metrics is read."""
        self._actor_queue_rows.labels(*self._common, actor).set_function(rows)

    def set_actor_speeds(self, speeds: Mapping[str, float]) -> None:
        """Sets the speeds that the planner assumes, for all current actors; 1 is typical. Removes other actors'
        series."""
        for actor, speed in speeds.items():
            self._actor_speed.labels(*self._common, actor).set(speed)
        for gone in self._measured_actors - speeds.keys():
            self._actor_speed.remove(*self._common, gone)
        self._measured_actors = set(speeds)

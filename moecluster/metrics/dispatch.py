"""Metrics of the messages between routers and expert actors."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from moecluster.metrics.buckets import DISPATCH_BUCKETS_S
from moecluster.metrics.declare import Declarations, MetricGroup, children
from moecluster.types import ExpertId

MAX_NONFINITE_SERIES = 256


@dataclass(frozen=True, kw_only=True)
class LaneUse:
    """The lane of one open connection of a router to an expert actor."""

    actor: str
    lane: str  # inline, shm or in-process
    reason: str  # why not a better one, in a word; best: there is none


class DispatchMetrics(MetricGroup):
    """Set by routers."""

    def __init__(self, declare: Declarations) -> None:
        super().__init__(declare)
        self._dispatch = children(
            declare.histogram(
                "dispatch_seconds",
                "From sending a message to an expert actor to its reply",
                DISPATCH_BUCKETS_S,
                "transport",
            ),
            declare.common,
        )
        self._dispatch_bytes = children(
            declare.counter("dispatch_bytes", "Tensor bytes exchanged with expert actors", "transport", "direction"),
            declare.common,
        )
        self._peer_messages = children(
            declare.counter("dispatch_actor_messages", "Messages to an expert actor that got a reply", "actor"),
            declare.common,
        )
        self._peer_seconds = children(
            declare.counter(
                "dispatch_actor_seconds",
                "Sum of the times from sending a message to an expert actor to its reply",
                "actor",
            ),
            declare.common,
        )
        self._dispatch_retries = declare.counter(
            "dispatch_retries", "Messages to expert actors sent again, by why", "reason"
        )
        self._nonfinite = declare.counter(
            "nonfinite_replies", "Replies of a replica with NaN or infinity", "layer", "expert", "actor"
        )
        self._nonfinite_seen: set[tuple[ExpertId, str]] = set()
        self._lanes: tuple[str, Callable[[], Iterable[LaneUse]]] | None = None
        declare.collect_from(self._transport)

    def count_dispatch(
        self, *, actor: str, transport: str, seconds: float, sent_bytes: int, received_bytes: int
    ) -> None:
        """Adds one message to an expert actor that got a reply."""
        self._dispatch(transport).observe(seconds)
        self._dispatch_bytes(transport, "sent").inc(sent_bytes)
        self._dispatch_bytes(transport, "received").inc(received_bytes)
        self._peer_messages(actor).inc()
        self._peer_seconds(actor).inc(seconds)

    def count_retry(self, reason: str) -> None:
        """Adds a message that is sent again. reason: a short fixed word, for example not_hosted, unavailable."""
        self._dispatch_retries.labels(*self._common, reason).inc()

    def count_nonfinite_reply(self, expert: ExpertId, actor: str) -> None:
        """Adds a batch for which a replica returned NaN or infinity. Beyond MAX_NONFINITE_SERIES replicas the labels
        are "other"."""
        if len(self._nonfinite_seen) < MAX_NONFINITE_SERIES:
            self._nonfinite_seen.add((expert, actor))
        known = (expert, actor) in self._nonfinite_seen
        names = (str(expert.layer), str(expert.index), actor) if known else ("other", "other", "other")
        self._nonfinite.labels(*self._common, *names).inc()

    def watch_lanes(self, router: str, lanes: Callable[[], Iterable[LaneUse]]) -> None:
        """Shows the lanes of a router's open connections; the function is called when /metrics is read."""
        self._lanes = (router, lanes)

    def _transport(self) -> Iterator[Metric]:
        if self._lanes is None:
            return
        router, lanes = self._lanes
        rows = [((router, use.actor, use.lane, use.reason), 1.0) for use in lanes()]
        yield self._declare.family(
            "gauge",
            "transport",
            "Always 1, for each open connection of a router to an expert actor: its lane, and why not a better one",
            ("router", "actor", "lane", "reason"),
            rows,
        )

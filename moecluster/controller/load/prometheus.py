"""A load source that queries a Prometheus server, which scrapes the /metrics of the expert actors.

It reads what the actors computed for each of their replicas, not what the routers' gates chose: every router counts
every expert, so that 8 routers of 58 layers with 256 experts would have 118,784 series. Every actor counts its own
replicas only: together they have one series for each replica, however many routers there are.

Counters are read per scraped process, where a restart shows as falling counters, and not summed over processes. A
reading is dated by the newest scrape, so what was counted between two scrapes is spread over the time between them.
What a replica computed between the last scrape and its removal is not counted; it is drained by then.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moecluster.controller.load.direct import SourceReading
from moecluster.controller.load.prometheus_client import PrometheusServer, Sample, quoted
from moecluster.errors import ConfigError, InvalidMessage, Unavailable
from moecluster.metrics.declare import COMMON_LABELS
from moecluster.placement.load.window import CounterReading
from moecluster.types import ActorWork

STARTED = "moecluster_start_time_seconds"
REPLICA_TOKENS = "moecluster_replica_tokens_total"
HIDDEN_REPLICAS = "moecluster_hidden_replicas"
ACTOR_TOKENS = "moecluster_actor_tokens_total"
ACTOR_RUNS = "moecluster_actor_expert_runs_total"
ACTOR_BUSY = "moecluster_actor_busy_seconds_total"
COUNTERS = (STARTED, REPLICA_TOKENS, HIDDEN_REPLICAS, ACTOR_TOKENS, ACTOR_RUNS, ACTOR_BUSY)
# Labels that tell the series of one process apart; the other labels (instance, job, ...) identify the process.
OWN_LABELS = frozenset({"__name__", *COMMON_LABELS, "layer", "expert", "actor"})
MAX_COUNT = 2**53  # a float64 represents every integer up to here

TIMEOUT_S = 5.0
MAX_AGE_S = 90.0  # of the newest scrape: enough for the usual interval of a minute, but not for a missed scrape

Process = tuple[tuple[str, str], ...]  # labels, sorted
Series = dict[Process, list[Sample]]  # of one metric


class PrometheusLoadSource:
    """A LoadSource that asks a Prometheus server."""

    def __init__(
        self,
        address: str,
        *,
        cluster: str,
        layer_experts: Mapping[int, int],
        timeout_s: float = TIMEOUT_S,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        """address: http://host:port; raises ConfigError for anything else. cluster: its name, a label of all its
        series. layer_experts: MoE layer -> its number of experts. max_age_s: processes scraped longer ago are
        ignored."""
        self._server = PrometheusServer(address, timeout_s=timeout_s)
        self._cluster = cluster
        self._layer_experts = dict(layer_experts)
        self._max_age_s = max_age_s
        self._last: tuple[Mapping[Process, float], SourceReading] | None = None  # scrape times, and their reading
        self._tokens: dict[Process, _Tokens] = {}

    def read(self, now_s: float) -> SourceReading:
        """Returns the counters of the last scrapes; the same object again until the next scrape.

        Raises Unavailable if the server is unreachable, or has no or no recent series of the cluster; DeadlineExceeded;
        ConfigError if an actor omits replicas; InvalidMessage for series that do not fit the model.
        """
        scrapes = self._server.query(f"timestamp({STARTED}{{cluster={quoted(self._cluster)}}})")
        if not scrapes:
            raise Unavailable(
                f"Prometheus at {self._server.address} has no series of cluster {self._cluster!r}: "
                "it should scrape the /metrics of every expert actor"
            )
        asked_s = scrapes[0].time_s
        scraped_s = {_process(scrape): _count(scrape) for scrape in scrapes}
        age_s = max(asked_s - max(scraped_s.values()), 0.0)
        if age_s > self._max_age_s:
            raise Unavailable(
                f"Prometheus at {self._server.address} last scraped cluster {self._cluster!r} {age_s:.0f} s ago, "
                f"and data older than {self._max_age_s:g} s is not used"
            )
        if self._last is None or self._last[0] != scraped_s:
            counters = self._counters(scraped_s, asked_s=asked_s, dated_s=now_s - age_s)
            self._last = (scraped_s, counters)
        return self._last[1]

    def _counters(self, scraped_s: Mapping[Process, float], *, asked_s: float, dated_s: float) -> SourceReading:
        """Returns the counters of these processes at a Unix time of the server, without those no longer scraped."""
        names, cluster = quoted("|".join(COUNTERS)), quoted(self._cluster)
        series: dict[str, Series] = {name: defaultdict(list) for name in COUNTERS}
        for sample in self._server.query(f"{{__name__=~{names},cluster={cluster}}}", at_s=asked_s):
            process, name = _process(sample), _text(sample, "__name__")
            if name not in series:
                raise InvalidMessage("", f"an answer with {name[:40]!r}, which was not asked for")
            if asked_s - scraped_s.get(process, asked_s) <= self._max_age_s:
                series[name][process].append(sample)
        for name, found in series.items():
            for process in found.keys() - series[STARTED].keys():
                raise InvalidMessage("", f"{_name(process)} shows {name} without {STARTED}")
        for process, hidden in series[HIDDEN_REPLICAS].items():
            if any(_count(sample) for sample in hidden):
                raise self._incomplete(process, shown=len(series[REPLICA_TOKENS][process]), hidden=hidden)
        self._tokens = {
            process: self._counted(process, samples, started_s=_count(series[STARTED][process][0]))
            for process, samples in series[REPLICA_TOKENS].items()
        }
        return SourceReading(
            counters=CounterReading(
                now_s=dated_s, tokens={_name(process): counted.layers for process, counted in self._tokens.items()}
            ),
            work=_work(series),
        )

    def _incomplete(self, process: Process, *, shown: int, hidden: Iterable[Sample]) -> ConfigError:
        replicas = shown + sum(int(_count(sample)) for sample in hidden)
        return ConfigError(
            f"{_name(process)} does not show all of its {replicas} replicas to Prometheus: set "
            f'cluster.max_expert_series to at least {replicas}, or controller.load_source = "direct"'
        )

    def _counted(self, process: Process, samples: Iterable[Sample], *, started_s: float) -> "_Tokens":
        """Returns what one incarnation of an actor computed. It shows only replicas that it holds now: for the others
        the last values stand, so that no counter falls."""
        before = self._tokens.get(process)
        layers: dict[int, npt.NDArray[np.int64]] = {}
        if before is not None and before.started_s == started_s:
            layers = {layer: tokens_E.copy() for layer, tokens_E in before.layers.items()}
        for sample in samples:
            layer, expert = _index(sample, "layer"), _index(sample, "expert")
            experts = self._layer_experts.get(layer, 0)
            if expert >= experts:
                raise InvalidMessage(REPLICA_TOKENS, f"expert {layer}/{expert}, which the model does not have")
            if layer not in layers:
                layers[layer] = np.zeros(experts, dtype=np.int64)
            layers[layer][expert] = int(_count(sample))
        return _Tokens(started_s=started_s, layers=layers)


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """What one incarnation of an actor computed since its start."""

    started_s: float
    layers: Mapping[int, npt.NDArray[np.int64]]  # layer -> by expert


def _work(series: Mapping[str, Series]) -> dict[str, ActorWork]:
    """Returns actor -> work of its newest incarnation: the previous one may be shown until a scrape misses it."""
    found: dict[str, tuple[float, ActorWork]] = {}
    for process, samples in series[ACTOR_TOKENS].items():
        started_s = _count(series[STARTED][process][0])
        runs, busy_s = (
            {_text(sample, "actor"): _count(sample) for sample in series[name][process]}
            for name in (ACTOR_RUNS, ACTOR_BUSY)
        )
        for sample in samples:
            actor = _text(sample, "actor")
            if actor not in busy_s or actor not in runs:
                continue  # scraped while it computed its very first batch
            work = ActorWork(computed_rows=int(_count(sample)), expert_runs=int(runs[actor]), busy_s=busy_s[actor])
            if actor not in found or started_s > found[actor][0]:
                found[actor] = (started_s, work)
    return {actor: work for actor, (_, work) in found.items()}


def _process(sample: Sample) -> Process:
    return tuple(sorted((name, value) for name, value in sample.labels.items() if name not in OWN_LABELS))


def _name(process: Process) -> str:
    return ",".join(f"{name}={value}" for name, value in process) or "a process without labels"


def _text(sample: Sample, label: str) -> str:
    if not sample.labels.get(label):
        raise InvalidMessage(str(sample.labels.get("__name__")), f"a series without the label {label}")
    return sample.labels[label]


def _index(sample: Sample, label: str) -> int:
    text = _text(sample, label)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise InvalidMessage(str(sample.labels.get("__name__")), f"{label} {text[:40]!r}, expected a number")
    return int(text)


def _count(sample: Sample) -> float:
    if not (math.isfinite(sample.value) and 0 <= sample.value <= MAX_COUNT):
        raise InvalidMessage(str(sample.labels.get("__name__")), f"{sample.value}, expected a count")
    return sample.value

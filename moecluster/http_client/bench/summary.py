"""Summarizes a load: percentiles, throughput, goodput, errors."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moecluster.http_client.bench.request import Measured


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Distribution of one quantity, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Latency limits of a good request. None: no limit."""

    time_to_first_token_s: float | None = None
    inter_token_s: float | None = None  # mean over the request

    def kept(self, measured: Measured) -> bool:
        """Returns whether the request completed, with its first token and its mean time per token within the limits."""
        if measured.error:
            return False
        first_s, token_s = measured.time_to_first_token_s, measured.time_per_token_s
        limit_s = self.time_to_first_token_s
        if limit_s is not None and (first_s is None or first_s > limit_s):
            return False
        return self.inter_token_s is None or token_s is None or token_s <= self.inter_token_s

    @property
    def is_given(self) -> bool:
        return self.time_to_first_token_s is not None or self.inter_token_s is not None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of one load. Spreads are of completed requests; None without any."""

    requests: int
    completed: int
    errors: Mapping[str, int]  # by kind
    duration_s: float  # from the start to the last end
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    time_to_first_token_s: Spread | None
    inter_token_s: Spread | None  # between two chunks, over all requests
    time_per_token_s: Spread | None  # a request's mean after its first token
    request_s: Spread | None
    sent_late_s: Spread | None  # this program's own delay: if large, the figures measure this program
    good: int | None  # requests within the SLO; None: no SLO given
    goodput_per_s: float | None


def summarize(measured: Sequence[Measured], slo: Slo) -> Summary:
    """Returns the figures of a load."""
    ended = [m for m in measured if not m.error]
    duration_s = max((m.ended_s for m in measured), default=0.0)
    per_s = 1.0 / duration_s if duration_s > 0 else 0.0
    good = sum(slo.kept(m) for m in measured) if slo.is_given else None
    output_tokens = sum(m.output_tokens for m in ended)
    return Summary(
        requests=len(measured),
        completed=len(ended),
        errors=dict(Counter(m.error for m in measured if m.error)),
        duration_s=duration_s,
        prompt_tokens=sum(m.prompt_tokens for m in ended),
        output_tokens=output_tokens,
        requests_per_s=len(ended) * per_s,
        output_tokens_per_s=output_tokens * per_s,
        time_to_first_token_s=spread([s for m in ended if (s := m.time_to_first_token_s) is not None]),
        inter_token_s=spread([s for m in ended for s in m.inter_token_s]),
        time_per_token_s=spread([s for m in ended if (s := m.time_per_token_s) is not None]),
        request_s=spread([m.request_s for m in ended]),
        sent_late_s=spread([m.sent_s - m.scheduled_s for m in measured]),
        good=good,
        goodput_per_s=None if good is None else good * per_s,
    )


def spread(seconds: Sequence[float]) -> Spread | None:
    """Returns the spread, with percentiles interpolated linearly; None for no values."""
    if not seconds:
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return Spread(mean=float(np.mean(seconds)), p50=p50, p90=p90, p99=p99, max=max(seconds))


def rate_over_time(times_s: Sequence[float], duration_s: float, num_bins: int) -> tuple[list[float], list[float]]:
    """Returns (the middle of each bin, events per second in it)."""
    counts, edges = np.histogram(times_s, bins=num_bins, range=(0.0, duration_s))
    width_s = duration_s / num_bins
    return [float(edge) + width_s / 2 for edge in edges[:-1]], [float(count) / width_s for count in counts]


def in_flight_over_time(measured: Sequence[Measured]) -> tuple[list[float], list[int]]:
    """Returns (times, requests in flight from each time on), counting from scheduled times to ends."""
    changes = sorted([(m.scheduled_s, 1) for m in measured] + [(m.ended_s, -1) for m in measured])
    levels = np.cumsum([change for _, change in changes])
    return [at_s for at_s, _ in changes], [int(level) for level in levels]

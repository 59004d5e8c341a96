"""Synthetic loads: Zipf popularity with drift, bursts, a daily swing, and topic changes in some layers at once.

Equal seeds give equal loads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Floats, Ints

DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """Parameters of a synthetic load. All layers have the same number of experts."""

    num_layers: int
    num_experts: int
    top_k: int
    tokens_per_s: float  # mean over the day
    zipf: float = 1.0  # the popularity of the expert of rank r is r ** -zipf; ranks differ by layer
    zipf_jitter: float = 0.1  # half width of the range around zipf from which each layer's exponent is drawn
    drift: float = 0.5  # standard deviation of the log of an expert's popularity around its rank's
    drift_time_s: float = 4 * 3600.0  # time in which the autocorrelation of the drift falls by a factor of e
    swing: float = 0.4  # the rate goes from 1 - swing times the mean at midnight to 1 + swing times at noon
    bursts_per_hour: float = 0.5  # topics that many ask for at once: one expert in each layer
    burst_factor: float = 4.0  # multiplies the popularity of such an expert
    burst_s: float = 900.0
    shift_every_s: float = 0.0  # how often the topic changes; 0: never
    shift_part: float = 0.3  # fraction of the layers whose experts then get a new order of popularity


@dataclass(frozen=True, kw_only=True)
class WindowLoad:
    """The load of one window: the true rates, and the counts that routers would report."""

    time_s: float  # the end of the window
    tokens_per_s: float
    popularity_LE: Floats  # fraction of a layer's assignments that goes to each expert; a layer's sum to 1
    counts_LE: Ints  # assignments, Poisson around the true rates


class SyntheticLoads:
    """The windows of a load, starting at midnight.

    Each expert's log-popularity is an Ornstein-Uhlenbeck process around that of its rank, exact at the windows' ends;
    bursts start as a Poisson process.
    """

    def __init__(self, shape: LoadShape, *, window_s: float, num_windows: int, seed: int) -> None:
        self.shape = shape
        self.window_s = window_s
        self.num_windows = num_windows
        self.seed = seed

    def __iter__(self) -> Iterator[WindowLoad]:
        shape, rng = self.shape, np.random.default_rng(self.seed)
        rank_LE = self._rank_popularity(rng)
        log_drift_LE = rng.normal(0.0, shape.drift, rank_LE.shape)
        kept = math.exp(-self.window_s / shape.drift_time_s)
        bursts: list[tuple[float, Ints]] = []  # (end, expert of each layer)
        layers = np.arange(shape.num_layers)
        for index in range(self.num_windows):
            time_s = (index + 1) * self.window_s
            noise_LE = rng.normal(0.0, shape.drift, rank_LE.shape)
            log_drift_LE = kept * log_drift_LE + math.sqrt(1 - kept * kept) * noise_LE
            for _ in range(rng.poisson(shape.bursts_per_hour * self.window_s / 3600.0)):
                experts_L = rng.integers(shape.num_experts, size=shape.num_layers)
                bursts.append((time_s + rng.exponential(shape.burst_s), experts_L))
            every_s = shape.shift_every_s
            if every_s and time_s // every_s > index * self.window_s // every_s:
                shifted = rng.choice(shape.num_layers, math.ceil(shape.shift_part * shape.num_layers), replace=False)
                rank_LE[shifted] = rng.permuted(rank_LE[shifted], axis=1)
            bursts = [(end_s, experts_L) for end_s, experts_L in bursts if end_s >= time_s]
            popularity_LE = rank_LE * np.exp(log_drift_LE)
            for _, experts_L in bursts:
                popularity_LE[layers, experts_L] *= shape.burst_factor
            popularity_LE /= popularity_LE.sum(axis=1, keepdims=True)
            middle_s = time_s - self.window_s / 2
            tokens_per_s = shape.tokens_per_s * (1 - shape.swing * math.cos(2 * math.pi * middle_s / DAY_S))
            mean_LE = popularity_LE * (tokens_per_s * self.window_s * shape.top_k)
            yield WindowLoad(
                time_s=time_s,
                tokens_per_s=tokens_per_s,
                popularity_LE=popularity_LE,
                counts_LE=rng.poisson(mean_LE).astype(np.int64),
            )

    def _rank_popularity(self, rng: np.random.Generator) -> Floats:
        shape = self.shape
        ranks_E = np.arange(1, shape.num_experts + 1, dtype=np.float64)
        exponent_L = shape.zipf + rng.uniform(-shape.zipf_jitter, shape.zipf_jitter, shape.num_layers)
        return np.stack([rng.permutation(ranks_E**-exponent) for exponent in exponent_L])

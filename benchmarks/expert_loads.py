"""Synthetic expert loads: Zipf laws, a one-time drift, and a day of windows with drift, bursts and a daily swing."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EXPONENT_JITTER = 0.05  # standard deviation of a layer's Zipf exponent
WALK, REVERSION = 0.02, 0.995  # of the logarithm of an expert's load, per window
BURSTS_A_LAYER = 0.128  # expected number that begin in a window
BURST_LOG_HEIGHT = (1.0, 2.0)
BURST_END = 0.2  # chance per window: a burst lasts five of them on average
SWING = 0.5  # fraction of the load that follows a second draw of the same law at noon


def zipf_loads(rng: np.random.Generator, num_layers: int, num_experts: int, exponent: float) -> Floats:
    """Returns Zipf loads [L, E]. Each layer sums to 1 and has its own order of experts and its own exponent."""
    exponent_L = exponent + EXPONENT_JITTER * rng.standard_normal(num_layers)
    load_LE = np.arange(1, num_experts + 1.0) ** -exponent_L[:, None]
    load_LE /= load_LE.sum(axis=1, keepdims=True)
    loads: Floats = rng.permuted(load_LE, axis=1)
    return loads


def drifted(rng: np.random.Generator, load_LE: Floats, drift: float) -> Floats:
    """Multiplies every load by its own lognormal factor; `drift` is the standard deviation of its logarithm."""
    loads: Floats = load_LE * np.exp(drift * rng.standard_normal(load_LE.shape))
    return loads


def day_of_windows(
    rng: np.random.Generator, num_layers: int, num_experts: int, exponent: float, num_windows: int
) -> Iterator[Floats]:
    """Yields the load [L, E] of each window of one day."""
    night_LE = zipf_loads(rng, num_layers, num_experts, exponent)
    noon_LE = zipf_loads(rng, num_layers, num_experts, exponent)
    walk_LE = np.zeros_like(night_LE)
    burst_LE = np.zeros_like(night_LE)
    for window in range(num_windows):
        walk_LE = REVERSION * walk_LE + WALK * rng.standard_normal(walk_LE.shape)
        burst_LE = np.where(rng.random(burst_LE.shape) < BURST_END, 0.0, burst_LE)
        begins_LE = rng.random(burst_LE.shape) < BURSTS_A_LAYER / num_experts
        burst_LE = np.where(begins_LE, rng.uniform(*BURST_LOG_HEIGHT, burst_LE.shape), burst_LE)
        swing = SWING * (0.5 - 0.5 * np.cos(2 * np.pi * window / num_windows))
        yield ((1 - swing) * night_LE + swing * noon_LE) * np.exp(walk_LE + burst_LE)

"""What the load will be when the next decision comes: a plan serves the coming window, not the one that was seen.

Per expert a smoothed slope of the logarithm (Holt's linear trend, in ratios): a daily swing is followed, while a burst,
whose step is cut to a small ratio first, hardly tilts it.
"""

from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Floats

SMOOTHING = 0.1  # weight of the newest step
MOST_STEP = 0.15  # of the logarithm, between two decisions


@dataclass(frozen=True, kw_only=True)
class Trend:
    """What was seen last, and where it went."""

    load_LE: Floats
    step_LE: Floats  # smoothed change of log load from one decision to the next


def forecast(load_LE: Floats, trend: Trend | None) -> tuple[Floats, Trend]:
    """The load one decision on, and the trend to pass in then. Without a trend yet, or for an expert that was idle, the
    load as it is."""
    if trend is None or trend.load_LE.shape != load_LE.shape:
        return load_LE, Trend(load_LE=load_LE, step_LE=np.zeros_like(load_LE))
    known = (load_LE > 0) & (trend.load_LE > 0)
    ratio_LE = np.divide(load_LE, trend.load_LE, out=np.ones_like(load_LE), where=known)
    newest_LE = np.clip(np.log(ratio_LE), -MOST_STEP, MOST_STEP)
    step_LE = trend.step_LE + SMOOTHING * (newest_LE - trend.step_LE)
    return load_LE * np.exp(step_LE), Trend(load_LE=load_LE, step_LE=step_LE)

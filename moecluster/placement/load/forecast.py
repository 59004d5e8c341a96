"""Forecasts the load at the next decision: a plan serves the coming window, not the measured one.

Per expert, a smoothed slope of the logarithm (Holt's linear trend, in ratios). It follows a daily swing, while a burst
hardly tilts it, because each step is clipped to a small ratio.
"""

from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Floats

SMOOTHING = 0.1  # weight of the newest step
MOST_STEP = 0.15  # clip of the logarithm's step between two decisions


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The last measured load and its slope."""

    load_LE: Floats
    step_LE: Floats  # smoothed change of log load from one decision to the next


def forecast(load_LE: Floats, trend: Trend | None) -> tuple[Floats, Trend]:
    """Returns the load one decision ahead, and the trend to pass in then.

    Without a trend yet, or for an idle expert, the forecast is the current load.
    """
    if trend is None or trend.load_LE.shape != load_LE.shape:
        return load_LE, Trend(load_LE=load_LE, step_LE=np.zeros_like(load_LE))
    known = (load_LE > 0) & (trend.load_LE > 0)
    ratio_LE = np.divide(load_LE, trend.load_LE, out=np.ones_like(load_LE), where=known)
    newest_LE = np.clip(np.log(ratio_LE), -MOST_STEP, MOST_STEP)
    step_LE = trend.step_LE + SMOOTHING * (newest_LE - trend.step_LE)
    return load_LE * np.exp(step_LE), Trend(load_LE=load_LE, step_LE=step_LE)

"""The entropy of the gates' routing weights that a router sees, for any model family."""

import numpy as np
import numpy.typing as npt


def routing_entropy(weights_TK: npt.NDArray[np.float32]) -> tuple[float, int]:
    """(sum of the tokens' entropies in nats, tokens) of weights scaled to sum to 1; weights <= 0 are ignored.

    Leaves out tokens without a positive weight (all assignments dropped) or with a non-finite one.
    """
    positive_TK = np.where(weights_TK > 0, weights_TK, 0.0).astype(np.float64)
    total_T = positive_TK.sum(axis=1)
    kept_T = np.isfinite(weights_TK).all(axis=1) & (total_T > 0)
    part_TK = positive_TK[kept_T] / total_T[kept_T, None]
    logs_TK = np.log(part_TK, out=np.zeros_like(part_TK), where=part_TK > 0)
    return max(float(-(part_TK * logs_TK).sum()), 0.0), int(kept_T.sum())

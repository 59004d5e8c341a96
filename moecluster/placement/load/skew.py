"""How unevenly the experts of a layer are loaded, whatever actor computes them."""

import numpy as np

from moecluster.placement.layout import Floats


def load_entropy(load_E: Floats) -> float | None:
    """Returns the entropy of the experts' loads divided by its maximum: 1 is even, 0 is one expert for all tokens; also
    1 for a layer of one expert. None without load."""
    total = load_E.sum()
    if not total > 0:
        return None
    if len(load_E) < 2:
        return 1.0
    share_E = load_E[load_E > 0] / total
    return float(max(-(share_E * np.log(share_E)).sum() / np.log(len(load_E)), 0.0))


def overload_factor(load_E: Floats) -> float | None:
    """Returns the load of the hottest expert divided by the mean load; 1 is even. None without load."""
    mean = load_E.mean()
    return float(load_E.max() / mean) if mean > 0 else None

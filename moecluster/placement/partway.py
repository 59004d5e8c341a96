"""Layouts that stand between two plans: some layers are already as planned, or some actors are gone."""

import numpy as np

from moecluster.placement.layout import Bools, Layout, with_shares, without
from moecluster.placement.shares import normalized


def layers_taken(before: Layout, after: Layout, layers_L: Bools) -> Layout:
    """The layout before, with some layers as they are after."""
    kept_R, taken_R = ~layers_L[before.layer_R], layers_L[after.layer_R]
    layer_R = np.concatenate([before.layer_R[kept_R], after.layer_R[taken_R]])
    order = np.argsort(layer_R, kind="stable")  # both parts are sorted within their layers
    return Layout(
        num_experts_L=before.num_experts_L,
        layer_R=layer_R[order],
        expert_R=np.concatenate([before.expert_R[kept_R], after.expert_R[taken_R]])[order],
        actor_R=np.concatenate([before.actor_R[kept_R], after.actor_R[taken_R]])[order],
        share_R=np.concatenate([before.share_R[kept_R], after.share_R[taken_R]])[order],
    )


def surviving(layout: Layout, gone_A: Bools) -> Layout:
    """What is left when actors are gone: the other replicas of their experts take their shares over."""
    left = without(layout, gone_A[layout.actor_R])
    return with_shares(left, normalized(left))


def hosted_experts_LE(layout: Layout) -> Bools:
    """Which experts stand somewhere: [L, E]."""
    hosted_X = np.zeros(layout.num_layers * layout.max_experts, dtype=np.bool_)
    hosted_X[layout.expert_key_R] = True
    return hosted_X.reshape(layout.num_layers, layout.max_experts)

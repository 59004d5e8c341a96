"""Moves from the current layout where shares alone cannot even out the load: the most gain for the fewest bytes.

A few rounds of single moves are simulated per layer. For each layer the number of rounds with the greatest gain over
its cost is kept; layers are served by gain per byte until the budget is spent.

Cost: a solve of the shares per round, for the layers above the trigger only; none while shares suffice.
"""

from dataclasses import dataclass, replace

import numpy as np

from moecluster.placement.layout import (
    Bools,
    Fleet,
    Floats,
    Ints,
    Layout,
    actor_load_LA,
    added_R,
    of_layers,
    with_layers,
    with_shares,
)
from moecluster.placement.plan.follow_load import recounted
from moecluster.placement.plan.relieve_actors import Wanted, relieved
from moecluster.placement.plan.replica_counts import least_worst_load_L
from moecluster.placement.plan.shares import least_max_shares, least_overflow

NO_LIMIT = 2.0**31  # moves: a budget may be infinite, an integer count may not
STRAIN = 0.3  # weight of the most loaded actor's load if shares had to stay near equal
LEAST_PROGRESS = 1e-4  # relative fall of the greatest load in a round, below which a layer is not pursued


@dataclass(frozen=True, kw_only=True)
class MoveSettings:
    """When a move pays. Time saved is counted as if a token waited only for the most loaded actor of each layer."""

    trigger: float = 0.02  # a layer is considered when its most loaded actor is this far above the bound, relatively
    min_gain: float = 0.004  # least relative fall of a layer's greatest load for which anything is moved
    lifetime_s: float = 600.0  # how long a gain is expected to last before the load has changed
    transfer_bytes_per_s: float = 1e9  # at which an actor loads an expert
    transfer_slowdown: float = 0.1  # fraction of the cluster's work that is lost while an expert is loaded
    rounds_a_budget: int = 3  # rounds over which moves that follow counts spread the whole budget
    max_rounds: int = 5  # of moves simulated per decision; the rest waits for the next decision
    moves_a_round: int = 2  # of a layer, where actors are relieved
    shifted: float = 0.3  # a layer this far above the bound has shifted, not drifted ...
    shifted_moves_a_round: int = 8  # ... and moves up to so many at once, less finely, if the budget allows


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """The layers under consideration after some rounds."""

    layout: Layout
    worst_L: Floats  # greatest load / speed
    bytes_L: Floats  # loaded, compared with the current layout


def with_moves(
    layout: Layout,
    load_LE: Floats,
    fleet: Fleet,
    budget_bytes: float,
    settings: MoveSettings,
) -> Layout:
    """Returns the layout after the moves that pay, within the budget; the layout itself if none does.

    layout: with shares of least greatest load, from `least_max_shares`; the result has such shares too.
    """
    worst_L = _worst_L(layout, load_LE, fleet)
    # With one slot per actor only replica counts matter: the gain of a move is certain, and cheap to find.
    trigger = settings.trigger if fleet.slots_A.max(initial=0) > 1 else settings.min_gain
    layers, bound_L = _layers_to_relieve(layout, load_LE, fleet, worst_L, trigger)
    most_moves_L = np.minimum(budget_bytes / fleet.expert_bytes_L[layers], NO_LIMIT).astype(np.int64)
    if len(layers) == 0 or (most_moves_L < 1).all():
        return layout
    part = of_layers(layout, layers)
    stages = _stages(
        part,
        load_LE[layers, : part.max_experts],
        _fleet_of(fleet, layers),
        Wanted(
            bound_L=bound_L,
            tolerance=settings.min_gain / 2,
            most_moves_L=most_moves_L,
            round_moves_L=_round_moves_L(worst_L[layers] / bound_L, most_moves_L, settings),
        ),
        settings,
        budget_bytes,
    )
    saved_s = settings.lifetime_s / worst_L.sum()  # per unit of a layer's greatest load
    price_s = settings.transfer_slowdown / settings.transfer_bytes_per_s  # per byte
    chosen_L = _chosen_stage_L(stages, saved_s, price_s, settings.min_gain, budget_bytes)
    for stage in range(1, len(stages)):
        taken = np.flatnonzero(chosen_L == stage)
        if len(taken):
            layout = with_layers(layout, layers[taken], of_layers(stages[stage].layout, taken))
    return layout


def _layers_to_relieve(
    layout: Layout, load_LE: Floats, fleet: Fleet, worst_L: Floats, trigger: float
) -> tuple[Ints, Floats]:
    """Returns the layers above the trigger, and the load / speed that no placement could go below."""
    fair_L = load_LE.sum(axis=1) / fleet.speed_A[fleet.slots_A > 0].sum()
    layers = np.flatnonzero(worst_L > (1 + trigger) * fair_L)
    bound_L = least_worst_load_L(load_LE[layers], layout.num_experts_L[layers], fleet)
    above = worst_L[layers] > (1 + trigger) * bound_L
    return layers[above], bound_L[above]


def _round_moves_L(above_L: Floats, most_moves_L: Ints, settings: MoveSettings) -> Ints:
    """Returns the moves per round of each layer; above_L: greatest load / lower bound, at least 1."""
    shifted_L = above_L > 1 + settings.shifted
    fair_L = most_moves_L // (settings.max_rounds * max(int(shifted_L.sum()), 1))
    at_once_L = np.clip(fair_L, settings.moves_a_round, settings.shifted_moves_a_round)
    return np.where(shifted_L, at_once_L, settings.moves_a_round)


def _stages(
    layout: Layout,
    load_LE: Floats,
    fleet: Fleet,
    wanted: Wanted,
    settings: MoveSettings,
    budget_bytes: float,
) -> list[_Stage]:
    """Returns the current layout, and the layout after each round; a layer without progress is not pursued further."""
    nothing_L = np.zeros(layout.num_layers)
    stages = [_Stage(layout=layout, worst_L=_worst_L(layout, load_LE, fleet), bytes_L=nothing_L)]
    going = np.arange(layout.num_layers)
    for _ in range(settings.max_rounds):
        before = stages[-1]
        part = of_layers(before.layout, going)
        load, of_part = load_LE[going, : part.max_experts], _fleet_of(fleet, going)
        left_L = wanted.most_moves_L[going] - (before.bytes_L[going] / of_part.expert_bytes_L).astype(np.int64)
        step = replace(
            wanted,
            bound_L=wanted.bound_L[going],
            most_moves_L=left_L,
            round_moves_L=wanted.round_moves_L[going],
        )
        fair_bytes_L = budget_bytes / settings.rounds_a_budget / len(going)  # grows as other layers finish
        moved = _moved_once(part, load, of_part, step, fair_bytes_L / of_part.expert_bytes_L)
        moved = with_shares(moved, least_max_shares(moved, load, of_part, even=True).share_R)
        worst_L = _worst_L(moved, load, of_part)
        better = np.flatnonzero(worst_L < before.worst_L[going] * (1 - LEAST_PROGRESS))
        if len(better) == 0:
            break
        going = going[better]
        after = with_layers(before.layout, going, of_layers(moved, better))
        after_L = before.worst_L.copy()
        after_L[going] = worst_L[better]
        loaded_L = np.bincount(after.layer_R[added_R(layout, after)], minlength=layout.num_layers)
        stages.append(_Stage(layout=after, worst_L=after_L, bytes_L=loaded_L * fleet.expert_bytes_L))
    return stages


def _moved_once(layout: Layout, load_LE: Floats, fleet: Fleet, wanted: Wanted, fair_moves_L: Floats) -> Layout:
    """One round: replica counts follow the load where shares cannot help; in the other layers actors are relieved."""
    most_L = np.minimum(np.ceil(fair_moves_L), wanted.most_moves_L).astype(np.int64)
    moved = recounted(layout, load_LE, fleet, (1 + wanted.tolerance) * wanted.bound_L, most_L)
    if moved is not layout:
        done_L = np.bincount(moved.layer_R[added_R(layout, moved)], minlength=layout.num_layers) > 0
        wanted = replace(wanted, most_moves_L=np.where(done_L, 0, wanted.most_moves_L))
    return relieved(moved, load_LE, fleet, wanted)


def _worst_L(layout: Layout, load_LE: Floats, fleet: Fleet) -> Floats:
    """Returns each layer's cost: the greatest load / speed under the best shares, and in part under near-equal ones."""
    worst_L: Floats = actor_load_LA(layout, load_LE, fleet).max(axis=1, initial=0.0)
    fair_L = load_LE.sum(axis=1) / fleet.speed_A[fleet.slots_A > 0].sum()
    even = with_shares(layout, _share_R(layout, least_overflow(layout, load_LE, fleet, fair_L), load_LE))
    strained_L = actor_load_LA(even, load_LE, fleet).max(axis=1, initial=0.0)
    cost_L: Floats = (1 - STRAIN) * worst_L + STRAIN * strained_L
    return cost_L


def _share_R(layout: Layout, load_R: Floats, load_LE: Floats) -> Floats:
    load_of_R = load_LE.reshape(-1)[layout.expert_key_R]
    return np.divide(load_R, load_of_R, out=layout.share_R.copy(), where=load_of_R > 0)


def _chosen_stage_L(stages: list[_Stage], saved_s: float, price_s: float, min_gain: float, budget_bytes: float) -> Ints:
    """Returns the stage that each layer moves to, 0 for no change.

    Greedy: repeatedly the step with the greatest net gain per byte, while the budget lasts.
    """
    worst_SL = np.stack([stage.worst_L for stage in stages])
    bytes_SL = np.stack([stage.bytes_L for stage in stages])
    net_SL = saved_s * (worst_SL[0] - worst_SL) - price_s * bytes_SL
    pays_SL: Bools = (net_SL > 0) & (worst_SL < (1 - min_gain) * worst_SL[0])
    net_SL = np.where(pays_SL, net_SL, -np.inf)
    net_SL[0] = 0.0
    every_L = np.arange(net_SL.shape[1])
    chosen_L = np.zeros(net_SL.shape[1], dtype=np.int64)
    while True:
        more_SL = net_SL - net_SL[chosen_L, every_L]
        cost_SL = bytes_SL - bytes_SL[chosen_L, every_L]
        may_SL = (more_SL > 0) & (cost_SL <= budget_bytes)
        if not may_SL.any():
            return chosen_L
        worth_SL = np.where(may_SL, more_SL / np.maximum(cost_SL, 1e-300), -np.inf)
        stage, layer = np.unravel_index(int(worth_SL.argmax()), worth_SL.shape)
        budget_bytes -= cost_SL[stage, layer]
        chosen_L[layer] = stage


def _fleet_of(fleet: Fleet, layers: Ints) -> Fleet:
    return Fleet(
        slots_A=fleet.slots_A, speed_A=fleet.speed_A, node_A=fleet.node_A, expert_bytes_L=fleet.expert_bytes_L[layers]
    )

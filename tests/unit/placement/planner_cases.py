"""Random clusters, loads and layouts for the planner's tests."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from moecluster.placement.layout import Fleet, Floats, Layout, make_layout


@dataclass(frozen=True, kw_only=True)
class Case:
    """A current layout of all experts, their load, and the fleet."""

    layout: Layout
    load_LE: Floats
    fleet: Fleet


@st.composite
def cases(draw: st.DrawFn, max_layers: int = 3, max_experts: int = 12, max_actors: int = 8) -> Case:
    """Any numbers: uneven slots, speeds, nodes and layers; loads that are flat, steep, or zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_layers, num_actors = draw(st.integers(1, max_layers)), draw(st.integers(1, max_actors))
    most = draw(st.integers(1, max_experts))
    num_experts_L = rng.integers(1, most + 1, num_layers)
    fleet = random_fleet(rng, int(num_experts_L.max()), num_actors, num_layers)
    load_LE = random_load(rng, num_experts_L, steepness=draw(st.sampled_from([0.0, 0.8, 1.5, 4.0])))
    return Case(layout=random_layout(rng, num_experts_L, fleet), load_LE=load_LE, fleet=fleet)


def random_fleet(rng: np.random.Generator, num_experts: int, num_actors: int, num_layers: int) -> Fleet:
    """Slots for every expert, and up to as many spare ones."""
    slots = num_experts + int(rng.integers(0, num_experts + 1))
    slots_A = np.bincount(rng.integers(0, num_actors, slots), minlength=num_actors)
    return Fleet(
        slots_A=slots_A,
        speed_A=rng.choice([0.5, 1.0, 1.0, 2.0, 4.0], num_actors),
        node_A=rng.integers(0, max(num_actors // 2, 1), num_actors),
        expert_bytes_L=rng.integers(1, 5, num_layers).astype(np.float64),
    )


def random_load(rng: np.random.Generator, num_experts_L: np.ndarray, steepness: float) -> Floats:
    load_LE = np.zeros((len(num_experts_L), num_experts_L.max()))
    for layer, count in enumerate(num_experts_L):
        load_LE[layer, :count] = 1000 * rng.permutation(np.arange(1, count + 1.0) ** -steepness)
        load_LE[layer, :count] *= rng.random(count) > rng.choice([0.0, 0.2, 1.0], p=[0.6, 0.3, 0.1])
    return load_LE


def random_layout(rng: np.random.Generator, num_experts_L: np.ndarray, fleet: Fleet) -> Layout:
    """Every expert once, anywhere; then random replicas, until no slot is free or a random stop."""
    rows = []
    for layer, count in enumerate(num_experts_L):
        free_A = fleet.slots_A.copy()
        order = list(rng.permutation(count)) + list(rng.integers(0, count, int(rng.integers(0, free_A.sum() + 1))))
        held: set[tuple[int, int]] = set()
        for expert in order:
            open_A = [a for a in np.flatnonzero(free_A).tolist() if (int(expert), a) not in held]
            if open_A:
                actor = int(rng.choice(open_A))
                held.add((int(expert), actor))
                free_A[actor] -= 1
        rows += [(layer, expert, actor) for expert, actor in held]
    layer_R, expert_R, actor_R = np.array(rows).T
    bare = make_layout(num_experts_L, layer_R, expert_R, actor_R, rng.random(len(rows)) + 0.01)
    return Layout(
        num_experts_L=bare.num_experts_L,
        layer_R=bare.layer_R,
        expert_R=bare.expert_R,
        actor_R=bare.actor_R,
        share_R=bare.share_R / np.bincount(bare.expert_key_R, bare.share_R)[bare.expert_key_R],
    )


def shares_per_expert(layout: Layout) -> Floats:
    """Sums of shares of the experts that have replicas."""
    keys, expert_of_R = np.unique(layout.expert_key_R, return_inverse=True)
    return np.bincount(expert_of_R, weights=layout.share_R, minlength=len(keys)).astype(np.float64)

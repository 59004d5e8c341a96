"""A policy that is easy to reason about: replicas in proportion to load, placed greedily, replanned if unbalanced."""

from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Layout, make_layout, moved_bytes
from moecluster.placement.names import mean_balancedness
from moecluster.placement.policy.interface import Decision, Observation
from moecluster.simulation.layouts import hosted_experts_LE


@dataclass(frozen=True)
class Asked:
    """Policy state: how often it was asked."""

    times: int = 0


@dataclass(frozen=True)
class ProportionalPolicy:
    """Replans all layers if balancedness is below `least` or an expert is lost; otherwise changes nothing."""

    name: str = "proportional"
    least: float = 0.9

    def first_state(self) -> Asked:
        return Asked()

    def decide(self, seen: Observation, state: Asked) -> tuple[Decision, Asked]:
        whole = hosted_experts_LE(seen.layout).sum() == seen.layout.num_experts_L.sum()
        before = mean_balancedness(seen.layout, seen.load_LE, seen.fleet)
        after = seen.layout if whole and (before is None or before >= self.least) else self._plan(seen)
        decision = Decision(
            layout=after,
            reason=f"asked {state.times + 1} times" + ("" if after is seen.layout else ": planned anew"),
            balancedness_before=before,
            balancedness_after=mean_balancedness(after, seen.load_LE, seen.fleet),
            moved_bytes=moved_bytes(seen.layout, after, seen.fleet),
        )
        return decision, Asked(times=state.times + 1)

    def _plan(self, seen: Observation) -> Layout:
        rows = [
            (layer, expert, actor, 1 / count)
            for layer, count_experts in enumerate(seen.layout.num_experts_L)
            for expert, count, actors in self._layer(seen, layer, int(count_experts))
            for actor in actors
        ]
        layer_R, expert_R, actor_R, share_R = np.array(rows).T
        return make_layout(
            seen.layout.num_experts_L,
            layer_R.astype(np.int64),
            expert_R.astype(np.int64),
            actor_R.astype(np.int64),
            share_R,
        )

    def _layer(self, seen: Observation, layer: int, num_experts: int) -> list[tuple[int, int, list[int]]]:
        """Returns (expert, replica count, actors) of a layer: counts by d'Hondt, then the least loaded actor each."""
        slots_A, load_E = seen.fleet.slots_A.copy(), seen.load_LE[layer, :num_experts]
        count_E = np.ones(num_experts, dtype=np.int64)
        most = int((slots_A > 0).sum())
        for _ in range(int(slots_A.sum()) - num_experts):
            count_E[int(np.where(count_E < most, load_E / count_E, -1.0).argmax())] += 1
        level_A, placed = np.zeros(len(slots_A)), []
        for expert in np.argsort(-load_E / count_E, kind="stable"):
            count, chosen = int(count_E[expert]), list[int]()
            for _ in range(count):
                free_A = (slots_A > 0) & ~np.isin(np.arange(len(slots_A)), chosen)
                if not free_A.any():
                    break
                actor = int(np.where(free_A, level_A / seen.fleet.speed_A, np.inf).argmin())
                chosen.append(actor)
                slots_A[actor] -= 1
                level_A[actor] += load_E[expert] / count
            placed.append((int(expert), len(chosen), chosen))
        return placed

"""Which expert actors leave when the cluster shrinks: those whose departure frees whole nodes."""

import re
from collections.abc import Collection, Mapping, Sequence


def choose_leaving(
    actors: Sequence[str], count: int, *, nodes: Mapping[str, str], shared_nodes: Collection[str] = ()
) -> tuple[str, ...]:
    """Returns `count` of the actors, or all if there are fewer, so that as many nodes as possible become free.

    actors: those that stay so far. nodes: actor -> its node; an actor without one stands for a node of its own.
    shared_nodes: nodes that hold other processes of the cluster, which no departure frees; their actors leave last.
    A node that can be emptied comes first, the one with the fewest actors before others; of equal ones, that of the
    actor with the highest number.
    """
    left: dict[str, list[str]] = {}
    for actor in sorted(actors, key=number_of):
        left.setdefault(nodes.get(actor) or f"node of {actor}", []).append(actor)
    chosen: list[str] = []
    while left and len(chosen) < count:
        room = count - len(chosen)

        def order(node: str, room: int = room) -> tuple[bool, bool, int, tuple[int, str]]:
            there = left[node]
            number, name = number_of(there[-1])
            return node in shared_nodes, len(there) > room, len(there), (-number, name)

        node = min(left, key=order)
        chosen += left.pop(node)[-room:]
    return tuple(sorted(chosen, key=number_of))


def number_of(actor: str) -> tuple[int, str]:
    """Sorts actors by the number in their names."""
    digits = re.search(r"(\d+)$", actor)
    return (int(digits.group()) if digits else 0, actor)

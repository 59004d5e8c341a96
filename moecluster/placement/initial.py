"""The initial placement of a cluster: contiguous, or a table given by the user."""

from collections.abc import Mapping, Sequence

from moecluster.errors import ConfigError
from moecluster.placement.expert_ids import experts_named
from moecluster.types import ExpertId, Replica

_KEY = "controller.placement"


def initial_placement(
    wanted: str | Mapping[str, Sequence[str]], num_experts: Mapping[int, int], actors: Sequence[str]
) -> tuple[Replica, ...]:
    """Returns the placement that `controller.placement` asks for: the word "contiguous", or a table."""
    if isinstance(wanted, str):
        assert wanted == "contiguous", wanted
        return contiguous_placement(num_experts, actors)
    return given_placement(wanted, num_experts, actors)


def all_experts(num_experts: Mapping[int, int]) -> tuple[ExpertId, ...]:
    """Returns every logical expert of a model, in order. num_experts: MoE layer -> E."""
    return tuple(
        ExpertId(layer=layer, index=index) for layer, count in sorted(num_experts.items()) for index in range(count)
    )


def contiguous_placement(num_experts: Mapping[int, int], actors: Sequence[str]) -> tuple[Replica, ...]:
    """Returns one replica of every expert; each layer's experts are cut into runs as even as possible, in actor order.

    num_experts: MoE layer -> E. An expert index is on the same actor in all layers of equal E; with as many actors as
    experts, every actor holds one index.
    """
    assert actors
    return tuple(
        Replica(expert=ExpertId(layer=layer, index=index), actor=actors[index * len(actors) // count])
        for layer, count in sorted(num_experts.items())
        for index in range(count)
    )


def given_placement(
    table: Mapping[str, Sequence[str]], num_experts: Mapping[int, int], actors: Sequence[str]
) -> tuple[Replica, ...]:
    """Returns the placement of a table: actor -> "layer/index", where * stands for every MoE layer or every index.

    An expert listed under several actors gets a replica on each, with equal shares. Raises ConfigError for an unknown
    actor, layer or index, an expert listed twice under one actor, or an expert that is not placed.
    """
    actors_of: dict[ExpertId, list[str]] = {}
    for actor, names in table.items():
        if actor not in actors:
            raise ConfigError(f"{_KEY}.{actor}: no such expert actor; there are {actors[0]} to {actors[-1]}")
        for name in names:
            for expert in experts_named(name, num_experts, f"{_KEY}.{actor}"):
                places = actors_of.setdefault(expert, [])
                if actor in places:
                    raise ConfigError(f"{_KEY}.{actor}: expert {expert} is named twice; an actor holds one replica")
                places.append(actor)
    missing = [str(expert) for expert in all_experts(num_experts) if expert not in actors_of]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ConfigError(f"{_KEY}: {len(missing)} experts are on no actor ({shown}); name each layer/index once")
    return tuple(
        Replica(expert=expert, actor=actor, share=1 / len(places))
        for expert, places in sorted(actors_of.items())
        for actor in places
    )

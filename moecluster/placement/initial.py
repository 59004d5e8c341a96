"""The initial placement of a cluster: contiguous, or a table given by the user."""

import re
from collections.abc import Mapping, Sequence

from moecluster.errors import ConfigError
from moecluster.types import ExpertId, Replica

_EXPERT = re.compile(r"(\*|\d+)/(\*|\d+)")
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


def experts_named(name: str, num_experts: Mapping[int, int], setting: str) -> list[ExpertId]:
    """Returns the experts of "layer/index", where * stands for every MoE layer or every index.

    Raises ConfigError, naming the setting.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        raise ConfigError(f'{setting}: got "{name}", expected layer/index such as 0/3, */1 or 2/*')
    layer_word, index_word = match.groups()
    layers = sorted(num_experts) if layer_word == "*" else [int(layer_word)]
    found = []
    for layer in layers:
        count = num_experts.get(layer)
        if count is None:
            known = ", ".join(map(str, sorted(num_experts)))
            raise ConfigError(f'{setting}: "{name}": layer {layer} has no experts; MoE layers are {known}')
        if index_word != "*" and int(index_word) >= count:
            raise ConfigError(f'{setting}: "{name}": layer {layer} has experts 0 to {count - 1}')
        found += [ExpertId(layer=layer, index=i) for i in (range(count) if index_word == "*" else [int(index_word)])]
    return found

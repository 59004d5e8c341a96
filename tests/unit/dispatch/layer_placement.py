"""Makes a layer's placement for tests of dispatch and replica choice."""

from moecluster.dispatch.permute import DispatchPart
from moecluster.types import ActorAddress, ExpertId, Placement, Replica

LAYER = 3
WIDTH = 4


def make_placement(holders: list[dict[str, float]], actors: list[str]) -> Placement:
    """holders: for each expert, actor -> share."""
    return Placement(
        term=1,
        generation=1,
        layer_experts={LAYER: len(holders)},
        actors={name: ActorAddress(actor=name, address="", incarnation="") for name in actors},
        replicas=tuple(
            Replica(expert=ExpertId(layer=LAYER, index=index), actor=actor, share=share)
            for index, shares in enumerate(holders)
            for actor, share in shares.items()
        ),
    )


def expert_of_pairs(part: DispatchPart) -> list[int]:
    return [e for e, count in zip(part.experts, part.pair_counts, strict=True) for _ in range(count)]

"""Hypothesis strategies of the controller's records, as they may come over the wire."""

from hypothesis import strategies as st

from moecluster.types import (
    ActorAddress,
    ActorLoads,
    ActorPhase,
    ActorState,
    ClusterLoads,
    ControllerStatus,
    ExpertId,
    LoadSnapshot,
    Operation,
    OperationKind,
    OperationPhase,
    Placement,
    PlanPreview,
    Replica,
    ReplicaAside,
    RouterState,
)

INT32 = 2**31 - 1
UINT64 = 2**64 - 1

texts = st.text(max_size=40).filter(lambda text: text.isascii() or text.isprintable())
names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=20)
optional_names = st.just("") | names
addresses = st.just("") | st.integers(1, 65535).map(lambda port: f"127.0.0.1:{port}")
amounts = st.floats(min_value=0, max_value=1e300)
int32s = st.integers(0, INT32)
uint64s = st.integers(0, UINT64)
balancednesses = st.none() | st.floats(min_value=0, max_value=1)
experts = st.builds(ExpertId, layer=int32s, index=int32s)
replicas = st.builds(Replica, expert=experts, actor=names, share=st.floats(min_value=0, max_value=1))
operations = st.builds(
    Operation,
    id=names,
    kind=st.sampled_from(OperationKind),
    phase=st.sampled_from(OperationPhase),
    reason=texts,
    detail=texts,
    arguments=st.lists(texts, max_size=3).map(tuple),
    created_s=amounts,
    ended_s=st.none() | st.floats(min_value=1e-3, max_value=1e12),
    balancedness_before=balancednesses,
    balancedness_predicted=balancednesses,
    balancedness_measured=balancednesses,
    moved_bytes=uint64s,
    added_replicas=int32s,
    removed_replicas=int32s,
)
operation_lists = st.lists(operations, max_size=3).map(tuple)
plans = st.builds(
    PlanPreview,
    policy=names,
    reason=texts,
    balancedness_before=amounts,
    balancedness_after=amounts,
    moved_bytes=amounts,
    added=st.lists(replicas, max_size=3).map(tuple),
    removed=st.lists(replicas, max_size=3).map(tuple),
    changed_shares=int32s,
)
actor_states = st.builds(
    ActorState,
    actor=names,
    address=addresses,
    incarnation=optional_names,
    phase=st.sampled_from(ActorPhase),
    experts=int32s,
    restarts=uint64s,
)
router_states = st.builds(
    RouterState,
    router=names,
    address=addresses,
    running=int32s,
    waiting=int32s,
    weight_version=uint64s,
    oldest_weight_version=uint64s,
    leaving=st.booleans(),
    ready_weight_version=uint64s,
    failed_weight_version=uint64s,
    problem=texts,
)
statuses = st.builds(
    ControllerStatus,
    term=uint64s,
    generation=uint64s,
    actors=st.lists(actor_states, max_size=3).map(tuple),
    checkpoint=texts,
    routers=int32s,
    policy=texts,
    held=st.booleans(),
    replicas=uint64s,
    cold_experts=uint64s,
    operations=operation_lists,
    router_states=st.lists(router_states, max_size=3).map(tuple),
    weight_version=uint64s,
    replicas_aside=st.lists(
        st.builds(ReplicaAside, actor=names, expert=experts, state=names, problem=texts, reports=uint64s), max_size=2
    ).map(tuple),
)
load_snapshots = st.builds(
    LoadSnapshot,
    tokens=st.dictionaries(experts, uint64s, max_size=5),
)
layer_experts = st.dictionaries(int32s, st.integers(1, 6), min_size=1, max_size=3)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """A placement with every expert on one or more actors, in equal shares."""
    layers = draw(layer_experts)
    actors = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    nodes = draw(st.lists(optional_names, min_size=len(actors), max_size=len(actors)))
    following = draw(uint64s)
    return Placement(
        term=draw(st.integers(1, UINT64)),
        generation=draw(uint64s),
        layer_experts=layers,
        actors={
            actor: ActorAddress(actor=actor, address=f"127.0.0.1:{5000 + i}", incarnation=draw(names), node=nodes[i])
            for i, actor in enumerate(actors)
        },
        replicas=draw(replica_lists(layers, actors)),
        held=draw(st.booleans()),
        weight_version=draw(uint64s),
        checkpoint=draw(optional_names),
        next_weight_version=following,
        next_checkpoint=draw(names) if following else "",
        old_weight_version=draw(uint64s),
    )


@st.composite
def replica_lists(draw: st.DrawFn, layers: dict[int, int], actors: list[str]) -> tuple[Replica, ...]:
    """Replicas of all experts of the layers."""
    found: list[Replica] = []
    for layer, count in layers.items():
        for index in range(count):
            on = draw(st.lists(st.sampled_from(actors), min_size=1, unique=True))
            expert = ExpertId(layer=layer, index=index)
            found += [Replica(expert=expert, actor=actor, share=1 / len(on)) for actor in on]
    return tuple(found)


@st.composite
def cluster_loads(draw: st.DrawFn) -> ClusterLoads:
    """Token counts of some routers in some of the layers."""
    layers = draw(layer_experts)

    def counts(layer: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(uint64s, min_size=layers[layer], max_size=layers[layer])))

    counted = st.lists(st.sampled_from(sorted(layers)), unique=True)
    return ClusterLoads(
        time_s=draw(amounts),
        model=draw(texts),
        tokens={
            router: {layer: counts(layer) for layer in draw(counted)}
            for router in draw(st.lists(names, max_size=3, unique=True))
        },
        actors=tuple(
            ActorLoads(
                actor=actor,
                node=draw(optional_names),
                computed_rows=draw(uint64s),
                busy_s=draw(amounts),
                speed=draw(st.floats(min_value=1e-3, max_value=1e3)),
                slots=draw(int32s),
            )
            for actor in draw(st.lists(names, max_size=3, unique=True))
        ),
        layer_experts=layers,
        expert_bytes={layer: draw(amounts) for layer in layers},
    )

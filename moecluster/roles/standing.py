"""What stands: the replicas and their shares, the actors that are up, and the placement that routers see of it."""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from moecluster.metrics import Metrics
from moecluster.placement.initial import all_experts
from moecluster.rpc.placement_board import NEVER, PlacementBoard
from moecluster.types import ActorAddress, ExpertId, Placement, Replica, WeightVersion


@dataclass(frozen=True, kw_only=True)
class UpActor:
    """An actor that serves."""

    address: ActorAddress
    held: frozenset[ExpertId]  # in every version that texts are written with
    prepared: frozenset[ExpertId] = frozenset()  # in the version that is next


@dataclass(kw_only=True)
class _State:
    term: int = 0
    generation: int = 0
    versions: tuple[WeightVersion, ...] = (WeightVersion(version=1, checkpoint=""),)  # one or two, the newest last
    published: int = 1  # of them: the version that new texts are written with
    last_version: int = 1  # the highest number that was ever given
    held: bool = False
    actors: tuple[str, ...] = ()
    leaving: frozenset[str] = frozenset()
    replicas: dict[int, tuple[Replica, ...]] = field(default_factory=dict)  # layer -> those that shall stand
    cold: frozenset[ExpertId] = frozenset()  # without a replica on purpose
    preparing: dict[str, frozenset[ExpertId]] = field(default_factory=dict)  # being loaded, not standing yet
    up: dict[str, UpActor] = field(default_factory=dict)


class Standing:
    """Every change that routers can see is published as a new generation. Thread-safe."""

    def __init__(
        self,
        layer_experts: Mapping[int, int],
        *,
        board: PlacementBoard,
        metrics: Metrics,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """on_change is called after every change that actors are told of."""
        self.layer_experts = dict(layer_experts)
        self._board = board
        self._metrics = metrics
        self._on_change = on_change
        self._open = False
        self._lock = threading.RLock()
        self._state = _State()

    # -- what stands --

    def unchanged(self) -> AbstractContextManager[bool]:
        """Nothing changes inside: several things are read that belong together."""
        return self._lock

    @property
    def number(self) -> tuple[int, int]:
        with self._lock:
            return (self._state.term, self._state.generation)

    @property
    def checkpoint(self) -> str:
        """The directory of the version that new texts are written with."""
        with self._lock:
            return self._published().checkpoint

    @property
    def weight_version(self) -> int:
        """That new texts are written with."""
        return self._state.published

    @property
    def versions(self) -> tuple[WeightVersion, ...]:
        """Those that stand, the newest last: two while weights are replaced."""
        return self._state.versions

    @property
    def last_version(self) -> int:
        """The highest number that was ever given to a version."""
        return self._state.last_version

    @property
    def written_with(self) -> tuple[WeightVersion, ...]:
        """The versions that texts may be written with now, the oldest first: replicas are loaded in all of them."""
        with self._lock:
            return tuple(v for v in self._state.versions if v.version <= self._state.published)

    @property
    def next_version(self) -> WeightVersion | None:
        """The version that is being prepared."""
        with self._lock:
            newest = self._state.versions[-1]
            return newest if newest.version > self._state.published else None

    def unprepared(self) -> list[str]:
        """Actors that are up and do not hold all that they serve in the next version yet."""
        with self._lock:
            return sorted(a for a, up in self._state.up.items() if (up.held & self.assigned(a)) - up.prepared)

    @property
    def held(self) -> bool:
        """Whether training runs keep the placement as it is."""
        return self._state.held

    @property
    def actors(self) -> tuple[str, ...]:
        """In being: up, or on their way."""
        return self._state.actors

    @property
    def leaving(self) -> frozenset[str]:
        """Actors that take no replicas any more."""
        return self._state.leaving

    @property
    def cold(self) -> frozenset[ExpertId]:
        """Experts without a replica on purpose."""
        return self._state.cold

    def up(self) -> dict[str, UpActor]:
        """The actors that serve."""
        with self._lock:
            return dict(sorted(self._state.up.items()))

    def replicas(self) -> tuple[Replica, ...]:
        """All that shall stand, also on actors that are lost for the moment."""
        with self._lock:
            return tuple(r for layer in sorted(self._state.replicas) for r in self._state.replicas[layer])

    def replicas_of(self, layer: int) -> tuple[Replica, ...]:
        """Those of one layer."""
        with self._lock:
            return self._state.replicas.get(layer, ())

    def assigned(self, actor: str) -> frozenset[ExpertId]:
        """What the actor shall hold."""
        with self._lock:
            return frozenset(r.expert for rs in self._state.replicas.values() for r in rs if r.actor == actor)

    def kept(self, actor: str) -> frozenset[ExpertId]:
        """What the actor may hold: what it shall, and what is being prepared."""
        with self._lock:
            return self.assigned(actor) | self._state.preparing.get(actor, frozenset())

    def holders(self, expert: ExpertId) -> list[ActorAddress]:
        """The actors that serve the expert now, in every version that texts are written with."""
        with self._lock:
            return [
                up.address
                for r in self._state.replicas.get(expert.layer, ())
                if r.expert == expert and (up := self._state.up.get(r.actor)) is not None and expert in up.held
            ]

    def lost(self) -> frozenset[ExpertId]:
        """Experts that should be served and have no replica on an actor that is up."""
        with self._lock:
            served = {
                r.expert
                for rs in self._state.replicas.values()
                for r in rs
                if (up := self._state.up.get(r.actor)) is not None and r.expert in up.held
            }
            return frozenset(all_experts(self.layer_experts)) - served - self._state.cold

    # -- changes --

    def begin(
        self,
        *,
        term: int,
        generation: int,
        checkpoint: str = "",
        versions: tuple[WeightVersion, ...] = (),
        weight_version: int = 0,
        last_version: int = 0,
        actors: Iterable[str],
        leaving: Iterable[str] = (),
        replicas: Iterable[Replica],
        cold: Iterable[ExpertId] = (),
    ) -> None:
        """What a controller begins with; nothing is published before `open`. checkpoint: of version 1, if no versions
        are given."""
        versions = versions or (WeightVersion(version=1, checkpoint=checkpoint),)
        with self._lock:
            by_layer: dict[int, list[Replica]] = {layer: [] for layer in sorted(self.layer_experts)}
            for replica in replicas:
                by_layer[replica.expert.layer].append(replica)
            self._state = _State(
                term=term,
                generation=generation,
                versions=versions,
                published=weight_version or versions[-1].version,
                last_version=max(last_version, versions[-1].version),
                actors=tuple(actors),
                leaving=frozenset(leaving),
                replicas={layer: tuple(rs) for layer, rs in by_layer.items()},
                cold=frozenset(cold),
                up=self._state.up,
            )

    def open(self) -> None:
        """From now on changes are published. Before every actor was tried, routers would see a part of the placement
        and wait for the rest."""
        with self._lock:
            self._open = True
            if self._board.number == NEVER:
                self._publish()

    def actor_up(
        self, address: ActorAddress, held: Iterable[ExpertId], *, versions: tuple[WeightVersion, ...] = ()
    ) -> None:
        """The actor serves these experts; in one life of it, also what it was given before.

        versions: those that it holds them in, if its loading took long enough for them to change: it serves nothing
        before it holds all that texts are written with.
        """
        with self._lock:
            if address.actor not in self._state.actors:
                return  # it was taken out of the cluster meanwhile
            if versions and not {v.version for v in self.written_with} <= {v.version for v in versions}:
                held = ()
            before = self._state.up.get(address.actor)
            same_life = before is not None and before.address == address
            more = before.held & self.kept(address.actor) if before is not None and same_life else frozenset()
            prepared = before.prepared if before is not None and same_life else frozenset()
            self._state.up[address.actor] = UpActor(address=address, held=frozenset(held) | more, prepared=prepared)
            self._publish()

    def actor_prepared(self, address: ActorAddress, version: int, experts: Iterable[ExpertId]) -> bool:
        """The actor holds these experts in the version that is next. False if that is not new."""
        with self._lock:
            up, following = self._state.up.get(address.actor), self.next_version
            if up is None or up.address != address or following is None or following.version != version:
                return False
            self._state.up[address.actor] = replace(up, prepared=frozenset(experts))
            return up.prepared != frozenset(experts)

    def actor_down(self, actor: str) -> None:
        """The actor is lost. Fine if it was not up."""
        with self._lock:
            if self._state.up.pop(actor, None) is not None:
                self._publish()

    def set_checkpoint(self, checkpoint: str) -> None:
        """Lost experts are loaded from this directory from now on, in the version that new texts are written with."""
        with self._lock:
            self._state.versions = tuple(
                replace(v, checkpoint=checkpoint) if v.version == self._state.published else v
                for v in self._state.versions
            )
            self._publish()

    def begin_version(self, checkpoint: str) -> WeightVersion:
        """A new version that is prepared from now on, beside the one that stands."""
        with self._lock:
            assert len(self._state.versions) == 1, "one version at a time is prepared"
            version = WeightVersion(version=self._state.last_version + 1, checkpoint=checkpoint)
            self._state.versions += (version,)
            self._state.last_version = version.version
            self._set_prepared_none()
            self._publish()
            return version

    def publish_version(self) -> tuple[int, int] | None:
        """New texts are written with the next version from now on: returns the number of the placement that says so.
        None if an actor does not hold all that it serves in that version."""
        with self._lock:
            assert self.next_version is not None
            if self.unprepared():
                return None
            self._state.published = self.next_version.version
            self._set_prepared_none()
            self._publish()
            return self.number

    def drop_other_versions(self) -> None:
        """Only the version that new texts are written with stands from now on."""
        with self._lock:
            self._state.versions = (self._published(),)
            self._set_prepared_none()
            self._publish()

    def set_held(self, held: bool) -> None:
        """Whether the placement stays as it is from now on."""
        with self._lock:
            if self._state.held != held:
                self._state.held = held
                self._publish()

    def add_actor(self, actor: str) -> None:
        """An actor that is being started."""
        with self._lock:
            if actor not in self._state.actors:
                self._state.actors = (*self._state.actors, actor)
        self._on_change()

    def set_leaving(self, actors: Iterable[str]) -> None:
        """These actors take no replicas any more; all others do."""
        with self._lock:
            self._state.leaving = frozenset(actors) & set(self._state.actors)
        self._on_change()

    def remove_actor(self, actor: str) -> None:
        """The actor is gone for good."""
        with self._lock:
            self._state.actors = tuple(a for a in self._state.actors if a != actor)
            self._state.leaving -= {actor}
            self._state.up.pop(actor, None)
            self._state.replicas = {
                layer: tuple(r for r in rs if r.actor != actor) for layer, rs in self._state.replicas.items()
            }
            self._publish()

    def prepare(self, actor: str, experts: Iterable[ExpertId]) -> None:
        """The actor is about to load experts that do not stand yet."""
        with self._lock:
            self._state.preparing[actor] = self._state.preparing.get(actor, frozenset()) | frozenset(experts)

    def prepared(self, actor: str, experts: Iterable[ExpertId]) -> None:
        """The end of `prepare`, well or not."""
        with self._lock:
            left = self._state.preparing.get(actor, frozenset()) - frozenset(experts)
            self._state.preparing = {**self._state.preparing, actor: left}

    def commit(
        self, changed: Mapping[int, tuple[Replica, ...]], loaded: Mapping[str, frozenset[ExpertId]]
    ) -> tuple[int, int]:
        """These layers' replicas shall stand from now on; loaded says what actors hold more. Returns the number that it
        was published by. An expert of the layers without a replica is cold from now on."""
        with self._lock:
            for layer, replicas in changed.items():
                self._state.replicas[layer] = replicas
                placed = {r.expert for r in replicas}
                experts = {ExpertId(layer=layer, index=index) for index in range(self.layer_experts[layer])}
                self._state.cold = (self._state.cold - placed) | (experts - placed)
            for actor, experts_more in loaded.items():
                up = self._state.up.get(actor)
                if up is not None:
                    self._state.up[actor] = replace(up, held=up.held | experts_more)
            self._publish()
            return self.number

    def unloaded(self, actor: str, experts: Iterable[ExpertId]) -> None:
        """The actor does not hold these any more."""
        with self._lock:
            up = self._state.up.get(actor)
            if up is not None:
                self._state.up[actor] = replace(up, held=up.held - frozenset(experts))

    def _published(self) -> WeightVersion:
        return next(v for v in self._state.versions if v.version == self._state.published)

    def _set_prepared_none(self) -> None:
        self._state.up = {actor: replace(up, prepared=frozenset()) for actor, up in self._state.up.items()}

    def _publish(self) -> None:
        if not self._open:
            return
        state = self._state
        state.generation += 1
        live = tuple(
            r
            for layer in sorted(state.replicas)
            for r in state.replicas[layer]
            if (up := state.up.get(r.actor)) is not None and r.expert in up.held
        )
        placement = Placement(
            term=state.term,
            generation=state.generation,
            layer_experts=self.layer_experts,
            actors={actor: up.address for actor, up in sorted(state.up.items())},
            replicas=with_whole_shares(live),
            held=state.held,
            weight_version=state.published,
            checkpoint=self._published().checkpoint,
            next_weight_version=following.version if (following := self.next_version) is not None else 0,
            next_checkpoint=following.checkpoint if following is not None else "",
            old_weight_version=next((v.version for v in state.versions if v.version < state.published), 0),
        )
        self._board.publish(placement)
        self._metrics.set_generation(state.generation)
        counts = dict.fromkeys(all_experts(self.layer_experts), 0)
        for replica in live:
            counts[replica.expert] += 1
        self._metrics.set_replicas(counts)
        self._on_change()


def with_whole_shares(replicas: tuple[Replica, ...]) -> tuple[Replica, ...]:
    """The replicas with each expert's shares scaled to sum to 1; equal ones where all are 0."""
    total: dict[ExpertId, float] = {}
    count: dict[ExpertId, int] = {}
    for r in replicas:
        total[r.expert] = total.get(r.expert, 0.0) + r.share
        count[r.expert] = count.get(r.expert, 0) + 1
    return tuple(
        replace(r, share=r.share / total[r.expert] if total[r.expert] > 0 else 1 / count[r.expert]) for r in replicas
    )

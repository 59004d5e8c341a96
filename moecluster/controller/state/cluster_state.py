"""The current state: the replicas and their shares, the actors that are up, and the placement published from it."""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from moecluster.controller.state.placement_state import PlacementState, UpActor
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.metrics import Metrics
from moecluster.placement.initial import all_experts
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import NO_PLACEMENT, ActorAddress, ExpertId, PlacementNumber, Replica, WeightVersion


class ClusterState:
    """Every change that routers can see is published as a new generation. Thread-safe."""

    def __init__(
        self,
        layer_experts: Mapping[int, int],
        *,
        board: PlacementBoard,
        metrics: Metrics,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """on_change is called after every change that is sent to actors."""
        self.layer_experts = dict(layer_experts)
        self._board = board
        self._metrics = metrics
        self._on_change = on_change
        self._open = False
        self._lock = threading.RLock()
        self._state = PlacementState()

    # -- current state --

    def unchanged(self) -> AbstractContextManager[bool]:
        """A context in which nothing changes, to read several values consistently."""
        return self._lock

    @property
    def number(self) -> PlacementNumber:
        with self._lock:
            return self._state.number

    @property
    def versions(self) -> WeightVersions:
        """The weight versions in use or being prepared."""
        return self._state.versions

    def unprepared(self) -> list[str]:
        """Returns the actors that are up and do not hold all that they serve in the next version yet."""
        with self._lock:
            return sorted(a for a, up in self._state.up.items() if (up.held & self.assigned(a)) - up.prepared)

    @property
    def held(self) -> bool:
        """Whether training runs hold the placement."""
        return self._state.held

    @property
    def actors(self) -> tuple[str, ...]:
        """All actors of the cluster: up, starting or lost."""
        return self._state.actors

    @property
    def leaving(self) -> frozenset[str]:
        """Actors that get no more replicas."""
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
        """All assigned replicas, including those on lost actors."""
        with self._lock:
            return self._state.all_replicas()

    def replicas_of(self, layer: int) -> tuple[Replica, ...]:
        """The assigned replicas of one layer."""
        with self._lock:
            return self._state.replicas.get(layer, ())

    def assigned(self, actor: str) -> frozenset[ExpertId]:
        """The experts that the actor should hold."""
        with self._lock:
            return frozenset(r.expert for rs in self._state.replicas.values() for r in rs if r.actor == actor)

    def kept(self, actor: str) -> frozenset[ExpertId]:
        """The experts that the actor may hold: those assigned to it, and those that it is about to load."""
        with self._lock:
            return self.assigned(actor) | self._state.preparing.get(actor, frozenset())

    def holders(self, expert: ExpertId) -> list[ActorAddress]:
        """The actors that serve the expert in every weight version in use, without replicas that are set aside."""
        with self._lock:
            replicas = self._state.replicas.get(expert.layer, ())
            serving = [r for r in replicas if r.expert == expert and self._state.serves(r)]
            return [self._state.up[r.actor].address for r in serving if (r.actor, expert) not in self._state.aside]

    def lost(self) -> frozenset[ExpertId]:
        """Experts that no actor serves, except cold ones."""
        with self._lock:
            served = {r.expert for r in self._state.all_replicas() if self._state.serves(r)}
            return frozenset(all_experts(self.layer_experts)) - served - self._state.cold

    # -- changes --

    def begin(
        self,
        *,
        term: int,
        generation: int,
        versions: WeightVersions,
        actors: Iterable[str],
        leaving: Iterable[str] = (),
        replicas: Iterable[Replica],
        cold: Iterable[ExpertId] = (),
    ) -> None:
        """Sets the state that a controller starts with; nothing is published before `open`."""
        with self._lock:
            by_layer: dict[int, list[Replica]] = {layer: [] for layer in sorted(self.layer_experts)}
            for replica in replicas:
                by_layer[replica.expert.layer].append(replica)
            self._state = PlacementState(
                term=term,
                generation=generation,
                versions=versions,
                actors=tuple(actors),
                leaving=frozenset(leaving),
                replicas={layer: tuple(rs) for layer, rs in by_layer.items()},
                cold=frozenset(cold),
                up=self._state.up,
            )

    def open(self) -> None:
        """Starts publishing. Before every actor was tried, routers would see a part of the placement and wait for the
        rest."""
        with self._lock:
            self._open = True
            if self._board.number == NO_PLACEMENT:
                self._publish()

    def actor_up(
        self, address: ActorAddress, held: Iterable[ExpertId], *, versions: tuple[WeightVersion, ...] = ()
    ) -> None:
        """The actor serves these experts, and what the same incarnation held before.

        versions: the weight versions that it holds them in; empty: not checked. They may have changed while it loaded:
        it serves nothing before it holds all versions in use.
        """
        with self._lock:
            if address.actor not in self._state.actors:
                return  # removed from the cluster meanwhile
            if versions and not {v.version for v in self.versions.written_with} <= {v.version for v in versions}:
                held = ()
            before = self._state.up.get(address.actor)
            same_incarnation = before is not None and before.address == address
            more = before.held & self.kept(address.actor) if before is not None and same_incarnation else frozenset()
            prepared = before.prepared if before is not None and same_incarnation else frozenset()
            if not same_incarnation:  # a new incarnation has reloaded everything
                self._state.aside = frozenset(key for key in self._state.aside if key[0] != address.actor)
            self._state.up[address.actor] = UpActor(address=address, held=frozenset(held) | more, prepared=prepared)
            if self.assigned(address.actor) <= self._state.up[address.actor].held:
                self._state.problems.pop(address.actor, None)
            self._publish()

    def actor_prepared(self, address: ActorAddress, version: int, experts: Iterable[ExpertId]) -> bool:
        """The actor holds these experts in the next version. Returns False if that is outdated or known already."""
        with self._lock:
            up, following = self._state.up.get(address.actor), self.versions.next
            if up is None or up.address != address or following is None or following.version != version:
                return False
            self._state.up[address.actor] = replace(up, prepared=frozenset(experts))
            return up.prepared != frozenset(experts)

    def actor_down(self, actor: str) -> None:
        """The actor is lost. Does nothing if it was not up."""
        with self._lock:
            if self._state.up.pop(actor, None) is not None:
                self._publish()

    def set_aside(self, replicas: frozenset[tuple[str, ExpertId]]) -> PlacementNumber:
        """Sets aside exactly these replicas (actor, expert): they get no rows if the expert has others. Returns the
        number of the placement published with that."""
        with self._lock:
            self._state.aside = replicas
            self._publish()
            return self.number

    def set_problem(self, actor: str, problem: str) -> None:
        """Records why the actor cannot load its experts; until it can, requests need not wait for it."""
        with self._lock:
            if actor in self._state.actors and self._state.problems.get(actor) != problem:
                self._state.problems[actor] = problem
                self._publish()

    def set_checkpoint(self, checkpoint: str) -> None:
        """Sets the directory of the weight version of new requests, which lost experts are loaded from."""
        with self._lock:
            self._state.versions = self._state.versions.with_checkpoint(checkpoint)
            self._publish()

    def begin_version(self, checkpoint: str) -> WeightVersion:
        """Starts preparing a new weight version beside the current one, and returns it."""
        with self._lock:
            self._set_versions(self._state.versions.with_next(checkpoint))
            return self._state.versions.all[-1]

    def publish_version(self) -> PlacementNumber | None:
        """Publishes the next version for new requests. Returns the number of that placement, or None if an actor does
        not hold all that it serves in that version."""
        with self._lock:
            published = self._state.versions.with_next_published()
            if self.unprepared():
                return None
            self._set_versions(published)
            return self.number

    def drop_other_versions(self) -> None:
        """Drops all weight versions but that of new requests."""
        with self._lock:
            self._set_versions(self._state.versions.without_others())

    def set_held(self, held: bool) -> None:
        """Sets whether training runs hold the placement."""
        with self._lock:
            if self._state.held != held:
                self._state.held = held
                self._publish()

    def add_actor(self, actor: str) -> None:
        """Adds an actor that is being started."""
        with self._lock:
            if actor not in self._state.actors:
                self._state.actors = (*self._state.actors, actor)
        self._on_change()

    def set_leaving(self, actors: Iterable[str]) -> None:
        """Sets which actors get no more replicas; all others may."""
        with self._lock:
            self._state.leaving = frozenset(actors) & set(self._state.actors)
        self._on_change()

    def remove_actor(self, actor: str) -> None:
        """Removes an actor for good, with its replicas."""
        with self._lock:
            self._state.actors = tuple(a for a in self._state.actors if a != actor)
            self._state.leaving -= {actor}
            self._state.up.pop(actor, None)
            self._state.problems.pop(actor, None)
            self._state.replicas = {
                layer: tuple(r for r in rs if r.actor != actor) for layer, rs in self._state.replicas.items()
            }
            self._publish()

    def prepare(self, actor: str, experts: Iterable[ExpertId]) -> None:
        """The actor is about to load experts that are not assigned to it yet."""
        with self._lock:
            self._state.preparing[actor] = self._state.preparing.get(actor, frozenset()) | frozenset(experts)

    def prepared(self, actor: str, experts: Iterable[ExpertId]) -> None:
        """Ends `prepare`, whether loading succeeded or not."""
        with self._lock:
            left = self._state.preparing.get(actor, frozenset()) - frozenset(experts)
            self._state.preparing = {**self._state.preparing, actor: left}

    def commit(
        self, changed: Mapping[int, tuple[Replica, ...]], loaded: Mapping[str, frozenset[ExpertId]]
    ) -> PlacementNumber:
        """Assigns the replicas of these layers. loaded: actor -> experts that it holds in addition. Returns the number
        of the placement published with that. An expert of these layers without a replica becomes cold."""
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
        """The actor no longer holds these experts."""
        with self._lock:
            up = self._state.up.get(actor)
            if up is not None:
                self._state.up[actor] = replace(up, held=up.held - frozenset(experts))
            self._state.aside -= {(actor, expert) for expert in experts}

    def _set_versions(self, versions: WeightVersions) -> None:
        if versions.weight_version != self._state.versions.weight_version:
            self._state.aside = frozenset()
        self._state.versions = versions
        self._state.up = {actor: replace(up, prepared=frozenset()) for actor, up in self._state.up.items()}
        self._publish()

    def _publish(self) -> None:
        if not self._open:
            return
        self._state.generation += 1
        placement = self._state.placement(self.layer_experts)
        self._board.publish(placement)
        self._metrics.set_generation(placement.generation)
        self._metrics.set_replicas(self.layer_experts, placement.replicas)
        self._on_change()

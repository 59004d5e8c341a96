"""One incarnation of an expert actor: sends it the desired state, and makes it hold its assigned experts in all weight
versions."""

import logging
from collections.abc import Iterable, Sequence

from moecluster.controller.actors.interfaces import DesiredState, MonitorOwner
from moecluster.errors import MoeClusterError, StaleRequest, Unavailable
from moecluster.growing import MAX_AHEAD
from moecluster.rpc.expert.interface import ExpertControl
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import ActorAddress, ExpertActorStatus, ExpertId, WeightVersion

logger = logging.getLogger(__name__)

MAX_PREPARED_AT_ONCE = 32  # experts of the next weight version, between two health checks
MAX_LOADS = 8  # attempts to load the assigned experts, if experts are moved away during each


class ActorSession:
    """Used by one thread, so requests arrive in order. Call load first. Every call raises what a request raised."""

    def __init__(
        self, address: ActorAddress, control: ExpertControl, *, owner: MonitorOwner, load_timeout_s: float
    ) -> None:
        self.address = address
        self._actor = address.actor
        self._control = control
        self._owner = owner
        self._load_timeout_s = load_timeout_s
        self._sent = owner.desired_state()  # what was sent last; load sends the first
        self._surplus: frozenset[ExpertId] = frozenset()  # experts that it should not have held at load

    def load(self) -> int:
        """Fences the actor, and loads its assigned experts, lost ones first. Returns how many of them it holds."""
        self._catch_up()
        self._send(self._sent)
        status = self._control.status()
        there = frozenset(status.experts).union(*status.other_versions.values())
        self._surplus = there - self._owner.kept(self._actor)
        for _ in range(MAX_LOADS):
            try:
                return self._load_assigned(status)
            except StaleRequest as exc:
                logger.info("%s starts loading again: %s", self._actor, exc)
                # If another controller took over, the actor refuses this; else experts were moved away meanwhile.
                self._send(self._owner.desired_state())
                status = self._control.status()
        raise Unavailable(f"experts of {self._actor} were moved away during each of {MAX_LOADS} attempts to load them")

    def _catch_up(self) -> None:
        """Raises the actor's term in steps: an actor refuses a term more than MAX_AHEAD above the one it knows."""
        if self._sent.term <= MAX_AHEAD:
            return
        known = self._control.status().placement.term
        while self._sent.term > known + MAX_AHEAD:
            known += MAX_AHEAD
            self._control.unload(term=known, experts=())

    def _load_assigned(self, status: ExpertActorStatus) -> int:
        """Loads missing experts. Raises StaleRequest if some were unloaded meanwhile, or another controller took
        over."""
        assigned = self._owner.assigned(self._actor)
        held = self.held_of(assigned, status)
        lost = self._owner.lost()
        parts = [part for part in (assigned & lost - held, assigned - lost - held) if part]
        if not parts:
            self._owner.actor_up(self.address, held, versions=self._sent.versions.written_with, complete=True)
        for part in parts:
            self._load_part(sorted(part))
            held |= part
            written_with = self._sent.versions.written_with
            self._owner.actor_up(self.address, held, versions=written_with, complete=held == assigned)
        return len(held)

    def send_news(self) -> None:
        """Sends the desired state, if it has changed since it was last sent."""
        desired_state = self._owner.desired_state()
        if desired_state != self._sent:
            self._send(desired_state)

    def held_of(self, experts: Iterable[ExpertId], status: ExpertActorStatus) -> set[ExpertId]:
        """Returns those of the experts that the actor holds in every weight version in use."""
        return set(experts).intersection(*(status.held(v.version) for v in self._sent.versions.written_with))

    def unload_surplus(self) -> None:
        """Unloads surplus once settled: before, routers may follow a predecessor's placement that names it."""
        if not self._surplus or not self._owner.settled():
            return
        surplus, self._surplus = self._surplus - self._owner.kept(self._actor), frozenset()
        if surplus:
            self._control.unload(term=self._sent.term, experts=sorted(surplus))

    def reload(self, experts: frozenset[ExpertId]) -> None:
        """Reloads experts that the actor serves, in every weight version in use. Raises Unavailable, StaleRequest."""
        if not experts:
            return
        try:
            versions = self._sent.versions.written_with
            loaded_bytes = sum(self._load_version(version, sorted(experts), replace=True) for version in versions)
        except StaleRequest as exc:
            logger.info("%s reloads nothing: %s", self._actor, exc)
            # If another controller took over, the actor refuses this; otherwise the experts were moved away.
            self._send(self._owner.desired_state())
        except MoeClusterError as exc:
            if isinstance(exc, Unavailable):
                self._control.status()  # raises if the actor itself is unreachable, not its source
            self._owner.reload_failed(self._actor, experts, exc)
        else:
            self._owner.reloaded(self._actor, experts, loaded_bytes)

    def prepare(self, assigned: frozenset[ExpertId], status: ExpertActorStatus) -> bool:
        """Loads a part of what the actor lacks of the next version, beside what it serves. Returns True if more is
        missing.

        In parts, so that health checks continue meanwhile. Raises Unavailable, StaleRequest.
        """
        version = self._sent.versions.next
        if version is None:
            return False
        held = set(status.held(version.version))
        missing = sorted(assigned - held)
        part = [expert for expert in missing if expert.layer == missing[0].layer][:MAX_PREPARED_AT_ONCE]
        loaded_bytes = 0
        try:
            if part:
                loaded_bytes = self._load_version(version, part, replace=False)
        except StaleRequest as exc:
            logger.info("%s did not load weight version %d: %s", self._actor, version.version, exc)
            # If another controller took over, the actor refuses this; else experts were moved meanwhile.
            self._send(self._sent)
            return True
        except MoeClusterError as exc:
            if isinstance(exc, Unavailable):
                self._control.status()  # raises if the actor itself is unreachable, not its source
            logger.info("%s does not load weight version %d: %s", self._actor, version.version, exc)
            self._owner.preparing_failed(self._actor, version.version, exc)
            return False
        self._owner.actor_prepared(self.address, version.version, held.union(part), loaded_bytes=loaded_bytes)
        return len(part) < len(missing)

    def _load_part(self, experts: Sequence[ExpertId]) -> None:
        while True:
            for version in self._sent.versions.written_with:
                loaded_bytes = self._load_version(version, experts, replace=True)
                self._owner.actor_loaded(self._actor, loaded_bytes)
            desired_state = self._owner.desired_state()
            if set(desired_state.versions.written_with) <= set(self._sent.versions.written_with):
                return
            self._send(desired_state)  # the versions changed while loading: load the new ones

    def _load_version(self, version: WeightVersion, experts: Sequence[ExpertId], *, replace: bool) -> int:
        return self._control.load(
            LoadRequest(
                term=self._sent.term,
                experts=tuple(experts),
                checkpoint=version.checkpoint,
                weight_version=version.version,
                dtype=self._sent.dtype,
                replace=replace,
                timeout_s=self._load_timeout_s,
            )
        )

    def _send(self, desired_state: DesiredState) -> None:
        self._control.set_placement(
            PlacementNotice(
                term=desired_state.term,
                generation=desired_state.generation,
                checkpoint=desired_state.versions.checkpoint,
                snapshot=desired_state.snapshot,
                weight_version=desired_state.versions.weight_version,
                weight_versions=tuple(v.version for v in desired_state.versions.all),
            )
        )
        self._sent = desired_state

"""Applies a change of placement layer by layer, make-before-break, without blocking the data path.

New replicas are loaded beside the current ones (from a peer that serves the expert, else from the checkpoint), then the
layer is published, and the replicas that it drops are unloaded once every router with a lease has applied the new
placement, or after a timeout. Until a layer is published, its current replicas serve.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass

from moecluster.controller.context import ControllerContext
from moecluster.controller.rebalance.recovery import Recovery
from moecluster.errors import MoeClusterError, StaleRequest, Unavailable
from moecluster.rpc.expert.interface import Connect, ControlConnection
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import ActorAddress, ExpertId, OperationPhase, Replica, WeightVersion

logger = logging.getLogger(__name__)

MAX_LOADS_AT_ONCE = 8  # actors of one layer that load at the same time


@dataclass(frozen=True, kw_only=True)
class ApplierSettings:
    """How replicas are moved."""

    dtype: str = ""  # empty: the checkpoint's
    load_timeout_s: float = 60.0
    drain_timeout_s: float = 10.0
    max_bytes_per_s: int = 0  # of each copy from a peer; 0: unlimited


class Interrupted(MoeClusterError):
    """The change gave way to something more urgent. Layers published by then remain."""


class PlacementApplier:
    """Used by one thread at a time."""

    def __init__(
        self, context: ControllerContext, settings: ApplierSettings, *, connect: Connect, recovery: Recovery
    ) -> None:
        """recovery: if it is due before a layer, the change is interrupted there."""
        self._settings = settings
        self._cluster_state = context.state
        self._leases = context.leases
        self._log = context.operations
        self._connect = connect
        self._recovery = recovery

    def apply(
        self,
        operation_id: str,
        target: Mapping[int, tuple[Replica, ...]],
        *,
        exactly: Collection[ExpertId] = (),
        urgent: bool = False,
    ) -> None:
        """Applies a target: layer -> all its replicas. Layers that match already are left alone.

        Replicas on lost actors stay assigned to them, except those of the experts in exactly. urgent: never gives way
        to a recovery. Raises Interrupted, or what loading raised; layers published by then remain, the others are
        unchanged.
        """
        with ExitStack() as stack:
            controls: dict[str, ControlConnection] = {}

            def control(actor: str) -> ControlConnection:
                if actor not in controls:
                    up = self._cluster_state.up().get(actor)
                    if up is None:
                        raise Unavailable(f"{actor} is lost")
                    controls[actor] = stack.enter_context(closing(self._connect(up.address)))
                return controls[actor]

            shares_only: dict[int, tuple[Replica, ...]] = {}
            for layer, wanted in target.items():
                replicas = self._with_lost_actors(layer, wanted, exactly)
                before = self._cluster_state.replicas_of(layer)
                if replicas == before:
                    continue
                if {(r.expert, r.actor) for r in replicas} == {(r.expert, r.actor) for r in before}:
                    shares_only[layer] = replicas
                    continue
                if not urgent and self._recovery.is_due():
                    raise Interrupted("interrupted by the recovery of lost experts")
                self._change_layer(operation_id, layer, replicas, control)
            if shares_only:
                self._log.update(operation_id, phase=OperationPhase.COMMITTING)
                self._cluster_state.commit(shares_only, {})

    def _with_lost_actors(
        self, layer: int, wanted: tuple[Replica, ...], exactly: Collection[ExpertId]
    ) -> tuple[Replica, ...]:
        """Returns the wanted replicas and those on lost actors that should come back: with share 0, if the expert has
        wanted replicas."""
        up, placed = self._cluster_state.up(), {r.expert for r in wanted}
        named = {(r.expert, r.actor) for r in wanted}
        waiting = [
            Replica(expert=r.expert, actor=r.actor, share=0.0 if r.expert in placed else r.share)
            for r in self._cluster_state.replicas_of(layer)
            if r.actor not in up
            and r.actor not in self._cluster_state.leaving
            and r.expert not in exactly
            and (r.expert, r.actor) not in named
        ]
        return tuple(sorted((*wanted, *waiting), key=lambda r: (r.expert, r.actor)))

    def _change_layer(
        self,
        operation_id: str,
        layer: int,
        replicas: tuple[Replica, ...],
        control: Callable[[str], ControlConnection],
    ) -> None:
        before = {(r.actor, r.expert) for r in self._cluster_state.replicas_of(layer)}
        after = {(r.actor, r.expert) for r in replicas}
        adding, removing = _by_actor(after - before), _by_actor(before - after)
        for actor, experts in adding.items():
            self._cluster_state.prepare(actor, experts)
        try:
            self._log.update(operation_id, phase=OperationPhase.PREPARING, detail=f"layer {layer}: loading")
            loaded_bytes = self._load_all(adding, control)
            self._log.update(operation_id, phase=OperationPhase.COMMITTING, detail=f"layer {layer}: publishing")
            number = self._cluster_state.commit({layer: replicas}, adding)
        finally:
            for actor, experts in adding.items():
                self._cluster_state.prepared(actor, experts)
        self._log.count_moved(
            operation_id,
            loaded_bytes=loaded_bytes,
            added=sum(map(len, adding.values())),
            removed=sum(map(len, removing.values())),
        )
        if removing:
            self._leases.wait_applied(number, self._settings.drain_timeout_s)
            self._unload_all(removing, control)

    def _load_all(self, adding: Mapping[str, frozenset[ExpertId]], control: Callable[[str], ControlConnection]) -> int:
        """Loads on all actors in parallel, and returns the bytes. If one fails, all unload again."""
        if not adding:
            return 0
        controls = {actor: control(actor) for actor in adding}

        def load(actor: str) -> int:
            try:
                return self._load(controls[actor], adding[actor])
            except Unavailable as exc:
                raise Unavailable(f"{actor} was lost: {exc}") from exc

        try:
            with ThreadPoolExecutor(max_workers=min(len(adding), MAX_LOADS_AT_ONCE)) as pool:
                return sum(pool.map(load, adding))
        except MoeClusterError:
            self._unload_all(adding, control)
            raise

    def _load(self, control: ControlConnection, experts: Iterable[ExpertId]) -> int:
        """Loads experts in every weight version in use: from a peer if one serves the expert; otherwise, or if the peer
        fails, from the checkpoint. Returns the bytes."""
        by_peer: dict[ActorAddress | None, list[ExpertId]] = {}
        for expert in sorted(experts):
            by_peer.setdefault(next(iter(self._cluster_state.holders(expert)), None), []).append(expert)
        return sum(
            self._load_version(control, group, peer, version)
            for version in self._cluster_state.versions.written_with
            for peer, group in by_peer.items()
        )

    def _load_version(
        self, control: ControlConnection, experts: list[ExpertId], peer: ActorAddress | None, version: WeightVersion
    ) -> int:
        if peer is not None:
            try:
                return self._load_group(control, experts, peer, version)
            except MoeClusterError as exc:
                # Stale: another controller, or other weights than those served. A checkpoint does not help there.
                if isinstance(exc, StaleRequest):
                    raise
                logger.info("%s gave no copy (%s): loading from the checkpoint", peer.actor, exc)
        return self._load_group(control, experts, None, version)

    def _load_group(
        self, control: ControlConnection, experts: list[ExpertId], peer: ActorAddress | None, version: WeightVersion
    ) -> int:
        return control.load(
            LoadRequest(
                term=self._cluster_state.number.term,
                experts=tuple(experts),
                checkpoint=version.checkpoint,
                weight_version=version.version,
                dtype=self._settings.dtype,
                peer=peer,
                max_bytes_per_s=self._settings.max_bytes_per_s,
                timeout_s=self._settings.load_timeout_s,
            )
        )

    def _unload_all(
        self, removing: Mapping[str, frozenset[ExpertId]], control: Callable[[str], ControlConnection]
    ) -> None:
        """Unloads experts. What cannot be unloaded now is surplus, which the actor's next session unloads."""
        for actor, experts in removing.items():
            self._cluster_state.unloaded(actor, experts)
            try:
                control(actor).unload(
                    term=self._cluster_state.number.term,
                    experts=sorted(experts),
                    drain_timeout_s=self._settings.drain_timeout_s,
                )
            except MoeClusterError as exc:
                logger.info("%s did not unload %d experts: %s", actor, len(experts), exc)


def _by_actor(pairs: Iterable[tuple[str, ExpertId]]) -> dict[str, frozenset[ExpertId]]:
    found: dict[str, set[ExpertId]] = {}
    for actor, expert in sorted(pairs):
        found.setdefault(actor, set()).add(expert)
    return {actor: frozenset(experts) for actor, experts in found.items()}

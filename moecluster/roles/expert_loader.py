"""Brings experts into an actor's slots, while others of it compute."""

import os
import threading
from collections.abc import Iterator, Set

from moecluster.errors import CheckpointError, StaleOrder
from moecluster.experts import compute
from moecluster.models.checkpoint import OpenCheckpoint, open_checkpoint
from moecluster.models.expert_source import ExpertSource
from moecluster.models.training_files import read_optimizer_state, read_step
from moecluster.roles.arriving_experts import ArrivedExpert, LoadSettings, read_experts, wanted_dtype
from moecluster.roles.block_proofs import BlockProofs
from moecluster.roles.controller_orders import LoadOrder
from moecluster.roles.expert_training import ExpertTraining
from moecluster.roles.hosted_experts import HostedExperts
from moecluster.roles.packer import Packer
from moecluster.roles.peer_copy import copy_experts
from moecluster.rpc.interfaces import ConnectPeer
from moecluster.types import ExpertId


class ExpertLoader:
    """One load at a time: whoever calls has the order's turn."""

    def __init__(
        self,
        actor: str,
        hosted: HostedExperts,
        training: ExpertTraining,
        state_lock: threading.RLock,
        *,
        connect_peer: ConnectPeer,
        open_elsewhere: OpenCheckpoint | None,
        batch_invariant: bool,
    ) -> None:
        """state_lock: held while slots and training change. open_elsewhere: for checkpoints not on this node."""
        self.run: compute.RunExpert = compute.run_plainly  # how the experts in the slots are to be run
        self._actor = actor
        self._hosted = hosted
        self._training = training
        self._state_lock = state_lock
        self._connect_peer = connect_peer
        self._open_elsewhere = open_elsewhere
        self._proofs = BlockProofs() if batch_invariant else None
        self.packer = Packer(actor, always_at_once=batch_invariant)
        self._sources: dict[str, ExpertSource] = {}

    def load(self, order: LoadOrder, settings: LoadSettings) -> int:
        """Returns the bytes loaded. Raises as ExpertService.load says."""
        is_trained = settings.optimizer is not None
        source = self._source(settings.checkpoint, here=is_trained)
        hosted = set(self._hosted.ids())
        if settings.optimizer is not None:
            step = read_step(settings.checkpoint)
            with self._state_lock:
                self._training.begin(settings.optimizer, settings.training_term, step)
            hosted = {expert for expert in hosted if self._training.holds(expert)}  # what was only served comes anew
        wanted = [e for e in dict.fromkeys(settings.experts) if settings.replace or e not in hosted]
        self._hosted.widths |= {layer.layer: layer.hidden_size for layer in source.layers}
        loaded_bytes, coming = 0, set(wanted)
        for arrived in self._arriving(source, wanted, settings, order):
            coming.discard(arrived.expert)
            if self._proofs is not None:
                width, dtype = self._hosted.widths[arrived.expert.layer], wanted_dtype(source, (), settings.dtype)
                self.run = self._proofs.add(arrived.module, width, dtype)
            state = read_optimizer_state(settings.checkpoint, arrived.expert) if is_trained else None
            with self._state_lock:
                order.check(arrived.expert)
                if arrived.expert in order.dropped:
                    continue
                version = self._adopt_version(arrived, settings.weight_version, coming)
                loaded_bytes += self._hosted.add(arrived.expert, arrived.module, version)
                if is_trained:
                    self._training.add(arrived.expert, arrived.module, state)
                else:
                    self._training.remove(arrived.expert)
        self._hosted.weight_version = settings.weight_version or self._hosted.weight_version
        order.finish(wanted)
        return loaded_bytes

    def _source(self, checkpoint: str, *, here: bool) -> ExpertSource:
        """here: the directory must be on this node, as training reads more of it than weights."""
        elsewhere = None if here else self._open_elsewhere
        if elsewhere is None and not os.path.isdir(checkpoint):  # False for any string, unlike Path.is_dir
            raise CheckpointError(f"{checkpoint}: no such directory on the node of {self._actor}")
        if checkpoint not in self._sources:
            self._sources = {checkpoint: ExpertSource(open_checkpoint(checkpoint, elsewhere))}
        return self._sources[checkpoint]

    def _arriving(
        self, source: ExpertSource, wanted: list[ExpertId], settings: LoadSettings, order: LoadOrder
    ) -> Iterator[ArrivedExpert]:
        if settings.peer is not None:
            return copy_experts(self._connect_peer, settings.peer, source, wanted, settings, order, self.packer)
        packer = None if settings.optimizer is not None else self.packer
        return read_experts(source, wanted, settings.dtype, order, packer)

    def _adopt_version(self, arrived: ArrivedExpert, ordered: int, coming: Set[ExpertId]) -> int:
        """The weight version of an arrived expert. coming: those that the load has yet to bring.

        One actor serves one version, so a peer's must be that of the experts that stay here. Raises StaleOrder.
        """
        version, served = arrived.weight_version, self._hosted.weight_version
        if version is None:
            return ordered or served
        stays = set(self._hosted.ids()) - coming - {arrived.expert}
        wanted = ordered or (served if stays else version)
        if version != wanted:
            raise StaleOrder(f"expert {arrived.expert}: the peer has weight version {version}, {wanted} is wanted here")
        self._hosted.weight_version = version
        return version

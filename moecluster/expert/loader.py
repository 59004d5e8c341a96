"""Loads experts into an actor's slots while its other experts compute."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from moecluster.errors import CheckpointError, StaleRequest
from moecluster.expert import compute
from moecluster.expert.batch_invariant import BlockProofs
from moecluster.expert.fencing import AdmittedLoad
from moecluster.expert.packer import Packer
from moecluster.expert.store import ExpertStore
from moecluster.expert.training import ExpertTraining
from moecluster.expert.weight_sources import (
    DTYPES,
    ReadExpert,
    copy_experts,
    read_experts,
    wanted_dtype,
)
from moecluster.models.checkpoint.reader import OpenCheckpoint, open_checkpoint
from moecluster.models.checkpoint.training_progress import read_step
from moecluster.models.checkpoint.training_state import read_optimizer_state
from moecluster.models.experts.source import ExpertSource, Origin
from moecluster.moe.experts.finiteness import probe_rows
from moecluster.rpc.expert.interface import ConnectPeer
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import ExpertId

MAX_SOURCES = 2  # directories kept open: one for each of the at most two weight versions


class ExpertLoader:
    """Runs one load at a time: the caller holds the load's turn (ControllerFence.loading)."""

    def __init__(
        self,
        actor: str,
        hosted: ExpertStore,
        training: ExpertTraining,
        state_lock: threading.RLock,
        *,
        connect_peer: ConnectPeer,
        open_elsewhere: OpenCheckpoint | None,
        batch_invariant: bool,
    ) -> None:
        """state_lock: held while slots and training change. open_elsewhere: opens checkpoints that are not on this
        node."""
        self.run: compute.RunExpert = compute.run_plainly  # how to run the loaded experts
        self._actor = actor
        self._hosted = hosted
        self._training = training
        self._state_lock = state_lock
        self._connect_peer = connect_peer
        self._open_elsewhere = open_elsewhere
        self._proofs = BlockProofs() if batch_invariant else None
        self.packer = Packer(actor, always_at_once=batch_invariant)
        self._sources: dict[tuple[str, int], ExpertSource] = {}  # by directory and weight version

    def load(self, admitted: AdmittedLoad, request: LoadRequest) -> int:
        """Returns the bytes loaded. Raises what ExpertService.load raises."""
        is_trained = request.optimizer is not None
        version = request.weight_version or self._hosted.weight_version
        source = self._source(request.checkpoint, version)
        files = source.checkpoint.files
        hosted = set(self._hosted.ids(version))
        if request.optimizer is not None:
            step = read_step(files.metadata)
            with self._state_lock:
                self._training.begin(request.optimizer, request.training_term, step)
            hosted = {expert for expert in hosted if self._training.holds(expert)}  # reload served-only ones
        wanted = [e for e in dict.fromkeys(request.experts) if request.replace or e not in hosted]
        self._hosted.widths |= {layer.layer: layer.hidden_size for layer in source.layers}
        wanted_dtype(source, wanted, request.dtype)
        origins = {expert: source.origin(expert) for expert in wanted} if not is_trained else {}
        shared = self._share(wanted, origins, version, request, admitted)
        loaded_bytes = 0
        for arrived in self._arriving(source, [e for e in wanted if e not in shared], request, admitted):
            if self._proofs is not None:
                width, dtype = self._hosted.widths[arrived.expert.layer], wanted_dtype(source, (), request.dtype)
                self.run = self._proofs.add(arrived.module, width, dtype)
            if self._on_trial(version):
                self._check_finite(arrived.expert, arrived.module, version, request)
            state = read_optimizer_state(files, arrived.expert) if is_trained else None
            with self._state_lock:
                admitted.check(arrived.expert)
                if arrived.expert in admitted.dropped:
                    continue
                version = _agreed_version(arrived, version)
                origin = origins.get(arrived.expert) if request.peer is None else None
                loaded_bytes += self._hosted.add(arrived.expert, arrived.module, version, origin=origin)
                if is_trained:
                    self._training.add(arrived.expert, arrived.module, state)
                elif version == self._hosted.weight_version:
                    self._training.remove(arrived.expert)
        admitted.finish(wanted)
        return loaded_bytes

    def _share(
        self,
        wanted: Sequence[ExpertId],
        origins: Mapping[ExpertId, Origin | None],
        version: int,
        request: LoadRequest,
        admitted: AdmittedLoad,
    ) -> set[ExpertId]:
        """Reuses experts that another version has loaded from the same bytes: in a checkpoint with only some new
        experts, all the others."""
        shared = set()
        for expert in wanted:
            origin = origins.get(expert)
            same = self._hosted.equal_to(expert, origin) if origin else None
            if same is None or same.weight_version == version or not _is_of(same.module, request.dtype):
                continue
            if self._on_trial(version):
                self._check_finite(expert, same.module, version, request)
            with self._state_lock:
                admitted.check(expert)
                if expert in admitted.dropped or self._training.holds(expert):
                    continue
                self._hosted.add(expert, same.module, version, origin=origin)
            shared.add(expert)
        return shared

    def _on_trial(self, version: int) -> bool:
        """Whether the version is an update that is not served yet: then a non-finite output fails the load."""
        return version > self._hosted.weight_version > 0

    @torch.no_grad()
    def _check_finite(self, expert: ExpertId, module: nn.Module, version: int, request: LoadRequest) -> None:
        """Raises CheckpointError if the expert returns NaN or infinity for a few moderate rows."""
        x_ND = probe_rows(self._hosted.widths[expert.layer], DTYPES[request.dtype or "float32"])
        if not bool(torch.isfinite(self.run(module, x_ND)).all()):
            raise CheckpointError(
                f"weight version {version} ({request.checkpoint}): expert {expert.index} of layer {expert.layer} "
                "answers NaN or infinity"
            )

    def _source(self, checkpoint: str, version: int) -> ExpertSource:
        """Opens the directory once per version, since it may be overwritten between versions."""
        elsewhere = self._open_elsewhere
        if elsewhere is None and not os.path.isdir(checkpoint):  # False for any string, unlike Path.is_dir
            raise CheckpointError(f"{checkpoint}: no such directory on the node of {self._actor}")
        wanted = (checkpoint, version)
        if wanted not in self._sources:
            newest = list(self._sources.items())[-(MAX_SOURCES - 1) :]
            self._sources = {**dict(newest), wanted: ExpertSource(open_checkpoint(checkpoint, elsewhere))}
        return self._sources[wanted]

    def _arriving(
        self, source: ExpertSource, wanted: list[ExpertId], request: LoadRequest, admitted: AdmittedLoad
    ) -> Iterator[ReadExpert]:
        if request.peer is not None:
            return copy_experts(self._connect_peer, request.peer, source, wanted, request, admitted, self.packer)
        packer = None if request.optimizer is not None else self.packer
        return read_experts(source, wanted, request.dtype, admitted, packer)


def _agreed_version(arrived: ReadExpert, wanted: int) -> int:
    """The weight version of a loaded expert. wanted: 0 if neither the request nor this actor names one.

    Raises StaleRequest if the peer has another version than wanted.
    """
    given = arrived.weight_version
    if given is None or given == wanted:
        return wanted
    if wanted:
        raise StaleRequest(f"expert {arrived.expert}: the peer has weight version {given}, {wanted} is wanted here")
    return given


def _is_of(module: nn.Module, dtype: str) -> bool:
    """Whether a loaded expert has this dtype."""
    return next((p.dtype for p in module.parameters()), None) == DTYPES.get(dtype or "float32")

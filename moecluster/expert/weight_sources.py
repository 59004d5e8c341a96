"""The sources of an expert's weights: a checkpoint, or another actor.

Copies from another actor go expert by expert, are checked against the model, and respect the rate limit.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from moecluster.errors import InvalidMessage, MoeClusterError, Unavailable
from moecluster.expert.fencing import AdmittedLoad
from moecluster.expert.packer import Packer
from moecluster.memory import RETURN_EVERY_BYTES, return_freed_memory
from moecluster.models.experts.prefetch import read_ahead
from moecluster.models.experts.source import ExpertSource
from moecluster.rpc.expert.interface import ConnectPeer, PeerExports
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import ActorAddress, ExpertId

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POLL_EVERY_S = 0.1  # while a copy pauses for its rate limit: checks whether the load is still valid


@dataclass(frozen=True, kw_only=True)
class ReadExpert:
    """An expert ready for its slot."""

    expert: ExpertId
    module: nn.Module
    weight_version: int | None = None  # None: unknown


def wanted_dtype(source: ExpertSource, experts: Sequence[ExpertId], dtype: str) -> torch.dtype:
    """The requested dtype. Raises InvalidMessage for an unknown dtype, and for experts that the model does not have."""
    sizes = {layer.layer: layer.num_experts for layer in source.layers}
    unknown = [str(e) for e in experts if not 0 <= e.index < sizes.get(e.layer, 0)]
    if unknown:
        raise InvalidMessage("experts", f"the model has no {', '.join(unknown[:5])} (layer/index)")
    if (dtype or "float32") not in DTYPES:
        raise InvalidMessage("dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")
    return DTYPES[dtype or "float32"]


def read_experts(
    source: ExpertSource, experts: Sequence[ExpertId], dtype: str, admitted: AdmittedLoad, packer: Packer | None
) -> Iterator[ReadExpert]:
    """Yields experts from a checkpoint, in order. packer: None for experts that are trained.

    Raises InvalidMessage, before any is read; CheckpointError; StaleRequest and DeadlineExceeded of the load.
    """
    checked_dtype = wanted_dtype(source, experts, dtype)

    wanted = (expert for expert in experts if expert not in admitted.dropped)
    read = read_ahead(source, wanted, checked_dtype, check=admitted.check)
    yield from finish((ReadExpert(expert=expert, module=module) for expert, module in read), packer)


def finish(arrived: Iterable[ReadExpert], packer: Packer | None) -> Iterator[ReadExpert]:
    """Prepares experts for their slots, the same way for every source: sets requires_grad, and packs served experts.

    packer: None for experts that are trained.
    """
    brought_bytes = 0  # since freed memory was last returned
    with packer.held() if packer is not None else nullcontext():
        for expert in arrived:
            module = expert.module.requires_grad_(packer is None)
            brought_bytes += sum(p.numel() * p.element_size() for p in module.parameters())
            if brought_bytes >= RETURN_EVERY_BYTES:
                return_freed_memory()
                brought_bytes = 0
            if packer is not None:
                packer.take(module)
            yield expert
    return_freed_memory()


class BytePace:
    """Limits bytes per second by waiting after each chunk: a token bucket that starts empty and saves nothing up."""

    def __init__(self, max_bytes_per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        """max_bytes_per_s: 0 for no limit."""
        self._max_bytes_per_s = max_bytes_per_s
        self._clock = clock
        self._paid_until_s = -math.inf

    def count(self, num_bytes: int) -> None:
        """Counts bytes that have just arrived."""
        if self._max_bytes_per_s:
            self._paid_until_s = max(self._paid_until_s, self._clock()) + num_bytes / self._max_bytes_per_s

    @property
    def wait_s(self) -> float:
        """How long to wait before taking more; not positive: no wait."""
        return self._paid_until_s - self._clock()


def copy_experts(
    connect: ConnectPeer,
    peer: ActorAddress,
    source: ExpertSource,
    experts: Sequence[ExpertId],
    request: LoadRequest,
    admitted: AdmittedLoad,
    packer: Packer,
) -> Iterator[ReadExpert]:
    """Copies experts one at a time from a peer that holds them in the requested dtype, prepared like those of a
    checkpoint.

    Raises InvalidMessage for an expert that the model does not have or an unknown dtype, before any is copied;
    Unavailable if the peer fails to deliver an expert; StaleRequest and DeadlineExceeded of the load.
    """
    dtype = wanted_dtype(source, experts, request.dtype)
    pace = BytePace(request.max_bytes_per_s)
    exports = connect(peer)
    admitted.interrupt = exports.close  # so that a hung peer delays no request of a newer term
    try:
        wanted = (expert for expert in experts if expert not in admitted.dropped)
        copied = (
            _copy(exports, peer, source, expert, dtype, admitted, pace, request.weight_version) for expert in wanted
        )
        yield from finish(copied, packer)
    finally:
        exports.close()


def _copy(
    exports: PeerExports,
    peer: ActorAddress,
    source: ExpertSource,
    expert: ExpertId,
    dtype: torch.dtype,
    admitted: AdmittedLoad,
    pace: BytePace,
    weight_version: int,
) -> ReadExpert:
    def keep_pace(num_bytes: int) -> None:
        admitted.check(expert)
        pace.count(num_bytes)
        while (wait_s := pace.wait_s) > 0:
            time.sleep(min(wait_s, POLL_EVERY_S))
            admitted.check(expert)

    admitted.check(expert)
    module = source.empty(expert)
    try:
        version = _fill(module, expert, dtype, exports, admitted.left_s, keep_pace, weight_version)
    except MoeClusterError as exc:
        admitted.check(expert)  # the load itself ended, and so ended the copy
        raise Unavailable(f"expert {expert} cannot be copied from {peer.actor}: {exc}") from exc
    return ReadExpert(expert=expert, module=module, weight_version=version)


def _fill(
    module: nn.Module,
    expert: ExpertId,
    dtype: torch.dtype,
    exports: PeerExports,
    timeout_s: float,
    keep_pace: Callable[[int], None],
    weight_version: int,
) -> int | None:
    """Replaces the module's parameters with the tensors that the peer sends; returns their weight version.
    weight_version: 0 for the version that the peer serves."""
    missing = {name: tuple(value.shape) for name, value in module.named_parameters()}
    if not missing:
        return None
    largest_bytes = max(math.prod(shape) for shape in missing.values()) * dtype.itemsize
    state: dict[str, torch.Tensor] = {}
    versions: set[int] = set()
    for sent in exports.tensors(
        expert,
        weight_version=weight_version,
        max_tensor_bytes=largest_bytes,
        timeout_s=timeout_s,
        pace=keep_pace,
    ):
        shape = missing.pop(sent.name, None)
        if sent.expert != expert or shape is None:
            raise InvalidMessage("name", f"{sent.expert} {sent.name} was not asked for or came twice")
        if sent.value.dtype != dtype or tuple(sent.value.shape) != shape:
            raise InvalidMessage(
                sent.name, f"{sent.value.dtype} {list(sent.value.shape)}, the model has {dtype} {list(shape)}"
            )
        state[sent.name] = sent.value
        versions.add(sent.weight_version)
    if missing:
        raise InvalidMessage("name", f"{', '.join(missing)} did not come")
    if len(versions) != 1:
        raise InvalidMessage("weight_version", f"{sorted(versions)} within one expert")
    module.load_state_dict(state, assign=True)
    return versions.pop()

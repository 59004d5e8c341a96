"""Experts copied from another actor: asked for one by one, checked against the model, and no faster than allowed."""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from moecluster.errors import InvalidMessage, MoeClusterError, Unavailable
from moecluster.models.expert_source import ExpertSource
from moecluster.roles.arriving_experts import ArrivedExpert, LoadSettings, finish, wanted_dtype
from moecluster.roles.controller_orders import LoadOrder
from moecluster.roles.packer import Packer
from moecluster.rpc.interfaces import ConnectPeer, PeerExports
from moecluster.types import ActorAddress, ExpertId

LOOK_EVERY_S = 0.1  # whether the order still stands, while nothing is taken


class BytePace:
    """Bytes per second, kept by waiting after what came: a token bucket that starts empty and saves nothing up."""

    def __init__(self, max_bytes_per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        """max_bytes_per_s: 0 for as fast as it goes."""
        self._max_bytes_per_s = max_bytes_per_s
        self._clock = clock
        self._paid_until_s = -math.inf

    def count(self, num_bytes: int) -> None:
        """Bytes that came now."""
        if self._max_bytes_per_s:
            self._paid_until_s = max(self._paid_until_s, self._clock()) + num_bytes / self._max_bytes_per_s

    @property
    def wait_s(self) -> float:
        """How long to wait before more may come; not positive: go on."""
        return self._paid_until_s - self._clock()


def copy_experts(
    connect: ConnectPeer,
    peer: ActorAddress,
    source: ExpertSource,
    experts: Sequence[ExpertId],
    settings: LoadSettings,
    order: LoadOrder,
    packer: Packer,
) -> Iterator[ArrivedExpert]:
    """Experts of a peer that holds them in the wanted dtype, ready as those out of a checkpoint; one at a time.

    Raises InvalidMessage for an expert that the model does not have or an unknown dtype, before any is copied;
    Unavailable for whatever the peer does not give as it should; StaleOrder and DeadlineExceeded of the order.
    """
    dtype = wanted_dtype(source, experts, settings.dtype)
    pace = BytePace(settings.max_bytes_per_s)
    exports = connect(peer)
    order.interrupt = exports.close  # a peer that hangs holds up no newer order
    try:
        wanted = (expert for expert in experts if expert not in order.dropped)
        copied = (
            _copy(exports, peer, source, expert, dtype, order, pace, settings.weight_version) for expert in wanted
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
    order: LoadOrder,
    pace: BytePace,
    weight_version: int,
) -> ArrivedExpert:
    def keep_pace(num_bytes: int) -> None:
        order.check(expert)
        pace.count(num_bytes)
        while (wait_s := pace.wait_s) > 0:
            time.sleep(min(wait_s, LOOK_EVERY_S))
            order.check(expert)

    order.check(expert)
    module = source.empty(expert)
    try:
        version = _fill(module, expert, dtype, exports, order.left_s, keep_pace, weight_version)
    except MoeClusterError as exc:
        order.check(expert)  # our own order has ended, and the copy with it
        raise Unavailable(f"expert {expert} cannot be copied from {peer.actor}: {exc}") from exc
    return ArrivedExpert(expert=expert, module=module, weight_version=version)


def _fill(
    module: nn.Module,
    expert: ExpertId,
    dtype: torch.dtype,
    exports: PeerExports,
    timeout_s: float,
    keep_pace: Callable[[int], None],
    weight_version: int,
) -> int | None:
    """Puts what the peer sends in the place of the module's parameters; returns its weight version. weight_version: 0
    for whatever the peer serves."""
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
            raise InvalidMessage(f"name: {sent.expert} {sent.name} was not asked for or came twice")
        if sent.value.dtype != dtype or tuple(sent.value.shape) != shape:
            raise InvalidMessage(
                f"{sent.name}: {sent.value.dtype} {list(sent.value.shape)}, the model has {dtype} {list(shape)}"
            )
        state[sent.name] = sent.value
        versions.add(sent.weight_version)
    if missing:
        raise InvalidMessage(f"name: {', '.join(missing)} did not come")
    if len(versions) != 1:
        raise InvalidMessage(f"weight_version: {sorted(versions)} within one expert")
    module.load_state_dict(state, assign=True)
    return versions.pop()

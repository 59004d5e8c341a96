"""Measures how much of the experts is loaded while a cluster starts, by asking the expert actors."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Self

import torch

from moecluster.errors import MoeClusterError
from moecluster.models.experts.prefetch import loaded_bytes
from moecluster.models.experts.source import ExpertSource
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.types import ExpertId, Replica

ASK_TIMEOUT_S = 1.0


def bytes_to_load(source: ExpertSource, replicas: Sequence[Replica], dtype: torch.dtype) -> int:
    """Returns the bytes that a placement's replicas occupy once loaded."""
    of_layer = {
        layer.layer: loaded_bytes(source, ExpertId(layer=layer.layer, index=0), dtype) for layer in source.layers
    }
    return sum(of_layer[replica.expert.layer] for replica in replicas)


class LoadedBytes:
    """Polls expert actors for the bytes of experts that they hold."""

    def __init__(self, addresses: Mapping[str, str], credentials: ClusterCredentials) -> None:
        """addresses: actor -> host:port."""
        self._stack = ExitStack()
        self._controls = {
            actor: self._stack.enter_context(
                closing(GrpcExpertControl(actor, address, timeout_s=ASK_TIMEOUT_S, credentials=credentials))
            )
            for actor, address in addresses.items()
        }
        self._last = dict.fromkeys(addresses, 0)

    def total(self) -> int:
        """Returns the sum over all actors; an actor that does not answer counts with its last answer."""
        for actor, control in self._controls.items():
            try:
                self._last[actor] = control.status().hosted_bytes
            except MoeClusterError:
                continue
        return sum(self._last.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

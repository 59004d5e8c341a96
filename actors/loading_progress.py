"""How much of the experts is loaded while a cluster starts: what their actors say that they hold."""

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
    """What a placement's replicas take once they are loaded."""
    of_layer = {
        layer.layer: loaded_bytes(source, ExpertId(layer=layer.layer, index=0), dtype) for layer in source.layers
    }
    return sum(of_layer[replica.expert.layer] for replica in replicas)


class HostedBytes:
    """Asks expert actors, over and over, how many bytes of experts they hold."""

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
        """Of one that does not answer, what it said before."""
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

"""The messages of a call for one MoE layer: raw hidden states in, the experts' sum and the gate's choice out.

Separate from the router's other messages, since this module needs torch: the gateway uses those without torch.
"""

import torch

from moecluster.proto import router_pb2
from moecluster.rpc import tensors


def encode_moe_request(layer: int, x_TD: torch.Tensor, timeout_s: float) -> router_pb2.MoeRequest:
    """Returns the message for these rows."""
    return router_pb2.MoeRequest(layer=layer, x=tensors.encode_tensor(x_TD.cpu()), timeout_s=timeout_s)


def decode_moe_reply(reply: router_pb2.MoeReply, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (y_TD, ids_TK, weights_TK) of the reply to x_TD. Raises InvalidMessage, naming the field."""
    rows = (len(x_TD), None)
    return (
        tensors.decode_tensor(reply.y, "y", dtypes=(x_TD.dtype,), shape=rows),
        tensors.decode_tensor(reply.ids, "ids", dtypes=(torch.int64,), shape=rows),
        tensors.decode_tensor(reply.weights, "weights", dtypes=(torch.float32,), shape=rows),
    )

"""The one place that touches the internals of transformers.

interface.py  our entry in its experts registry; finding and attaching the experts modules of a model
shard.py      one expert of a family's own experts module, by itself
modelling.py  model classes, built empty on the meta device or with experts that never exist
keys.py       from checkpoint keys to module parameters and back, by its own conversion mapping
"""

from transformers.integrations.moe import use_experts_implementation

from moecluster.hf.interface import BACKEND_NAME, Backend, MoeLayer, attach, find_experts, moe_layers, register_backend
from moecluster.hf.shard import ExpertShard

__all__ = [
    "BACKEND_NAME",
    "Backend",
    "ExpertShard",
    "MoeLayer",
    "attach",
    "find_experts",
    "moe_layers",
    "register_backend",
    "use_experts_implementation",
]

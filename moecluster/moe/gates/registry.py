"""Gates by the name of the system they come from."""

from collections.abc import Mapping
from typing import Any

from moecluster.config.fields import read_section, suggest
from moecluster.errors import ConfigError
from moecluster.moe.gates.base import Gate
from moecluster.moe.gates.deepseek_v3 import DeepseekV3Gate
from moecluster.moe.gates.mixtral import MixtralGate
from moecluster.moe.gates.qwen3_moe import Qwen3MoeGate
from moecluster.moe.gates.sparsely_gated import SparselyGatedGate
from moecluster.moe.gates.switch import SwitchGate

GATES: Mapping[str, type[Gate]] = {
    "mixtral": MixtralGate,
    "qwen3-moe": Qwen3MoeGate,
    "switch": SwitchGate,
    "sparsely-gated": SparselyGatedGate,
    "deepseek-v3": DeepseekV3Gate,
}


def make_gate(name: str, *, hidden_size: int, num_experts: int, top_k: int, **options: Any) -> Gate:
    """Returns a gate with zero weights. Raises ConfigError for an unknown gate or option, or a value out of range."""
    if name not in GATES:
        raise ConfigError(f'model.gate: got "{name}", no such gate; {suggest(name, GATES)}')
    gate_type = GATES[name]
    read_options = read_section(gate_type.options_type, options)
    return gate_type(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, options=read_options)

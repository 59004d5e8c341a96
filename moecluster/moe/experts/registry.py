"""Expert kinds by name."""

from collections.abc import Mapping

from moecluster.config.fields import suggest
from moecluster.errors import ConfigError
from moecluster.moe.experts.base import Expert
from moecluster.moe.experts.ffn import FfnExpert
from moecluster.moe.experts.glu import GluExpert

EXPERT_KINDS: Mapping[str, type[Expert]] = {"ffn": FfnExpert, "glu": GluExpert}


def make_expert(kind: str, *, hidden_size: int, inner_size: int, activation: str) -> Expert:
    """Returns a fresh expert. Raises ConfigError for an unknown kind or activation."""
    if kind not in EXPERT_KINDS:
        raise ConfigError(f'model.expert_kind: got "{kind}", no such kind; {suggest(kind, EXPERT_KINDS)}')
    return EXPERT_KINDS[kind](hidden_size=hidden_size, inner_size=inner_size, activation=activation)

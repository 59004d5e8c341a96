"""The policies by name. A policy decides which replicas are placed where, and their shares.

share   restores lost experts, empties drained actors, re-solves the shares, and moves replicas where that pays
eplb    the published plan of DeepSeek's EPLB, recomputed at every decision: the baseline
static  restores and drains, and changes nothing else
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from moecluster.config.fields import suggest
from moecluster.errors import ConfigError
from moecluster.placement.policy.eplb import EplbPolicy
from moecluster.placement.policy.interface import Policy
from moecluster.placement.policy.share import SharePolicy
from moecluster.placement.policy.static import StaticPolicy

POLICIES: Mapping[str, Callable[[], Policy[Any]]] = MappingProxyType(
    {"share": SharePolicy, "eplb": EplbPolicy, "static": StaticPolicy}
)


def policy_named(name: str) -> Policy[Any]:
    """Returns the policy with its default settings. Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f'controller.policy: got "{name}", no such policy; {suggest(name, POLICIES)}')
    return POLICIES[name]()

"""Experts as users write them: layer/index, where * may stand for every MoE layer or every index."""

import re
from collections.abc import Mapping

from moecluster.errors import ConfigError
from moecluster.types import ExpertId

_NUMBER = r"([0-9]{1,9})"
_EXPERT = re.compile(f"{_NUMBER}/{_NUMBER}")
_PATTERN = re.compile(rf"(?:\*|{_NUMBER})/(?:\*|{_NUMBER})")


def parse_expert(text: str, setting: str) -> ExpertId:
    """The expert of layer/index, as str(ExpertId) writes it. Raises ConfigError, naming the setting."""
    match = _EXPERT.fullmatch(text)
    if match is None:
        raise _misspelled(text, setting, "3/17")
    return ExpertId(layer=int(match[1]), index=int(match[2]))


def experts_named(pattern: str, num_experts: Mapping[int, int], setting: str) -> list[ExpertId]:
    """The experts of layer/index, where * stands for every MoE layer or every index. num_experts: MoE layer -> E.

    Raises ConfigError, naming the setting.
    """
    match = _PATTERN.fullmatch(pattern)
    if match is None:
        raise _misspelled(pattern, setting, "0/3, */1 or 2/*")
    found = []
    for layer in sorted(num_experts) if match[1] is None else [int(match[1])]:
        count = num_experts.get(layer)
        if count is None:
            known = ", ".join(map(str, sorted(num_experts)))
            raise ConfigError(f'{setting}: "{pattern}": layer {layer} has no experts; MoE layers are {known}')
        if match[2] is not None and int(match[2]) >= count:
            raise ConfigError(f'{setting}: "{pattern}": layer {layer} has experts 0 to {count - 1}')
        found += [ExpertId(layer=layer, index=i) for i in (range(count) if match[2] is None else [int(match[2])])]
    return found


def _misspelled(text: str, setting: str, examples: str) -> ConfigError:
    return ConfigError(f'{setting}: got "{text[:40]}", expected layer/index such as {examples}')

"""Finds which families of the installed transformers have MoE layers, from its source code."""

import re
from pathlib import Path

import transformers
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from moecluster.hf.interface import UNATTACHABLE_FAMILIES

_DECORATED = re.compile(r"^@use_experts_implementation\b", re.MULTILINE)
_EXPERTS = re.compile(r"^class \w*(Experts|SparseMoe|SparseMLP|MoE|TopKRouter|Top[12]Router)\w*\(", re.MULTILINE)
# Their experts are not layers of a language model.
_OTHERS = frozenset(("vitpose_backbone",))


def families_with_interface() -> tuple[str, ...]:
    """Returns every model_type whose module has an experts class that uses transformers' experts interface. If a module
    defines several model types, only those that are named like it, or that are or contain a language model."""
    return tuple(sorted(family for module in _modules(decorated=True) for family in _families_of(module)))


def families_without_interface() -> tuple[str, ...]:
    """Returns every model_type whose module has experts that do not use the interface, and UNATTACHABLE_FAMILIES."""
    found = {family for module in _modules(decorated=False) for family in _families_of(module)}
    return tuple(sorted(found | (UNATTACHABLE_FAMILIES & CONFIG_MAPPING_NAMES.keys())))


def _modules(*, decorated: bool) -> list[str]:
    found = []
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = file.read_text(encoding="utf-8")
        uses = _DECORATED.search(source) is not None
        if uses == decorated and _EXPERTS.search(source) and file.parent.name not in _OTHERS:
            found.append(file.parent.name)
    return sorted(set(found))


def _families_of(module: str) -> list[str]:
    families = [family for family in CONFIG_MAPPING_NAMES if model_type_to_module_name(family) == module]
    if len(families) == 1:
        return families
    language_models = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
    return [
        family
        for family in families
        if family in language_models or family == module or "text_config" in CONFIG_MAPPING[family].sub_configs
    ]

"""Converts between checkpoint keys and the rows of one expert, by transformers' own conversion mapping.

transformers maps every checkpoint key to a module parameter (renamings, then at most one converter); converters merge
the per-expert keys of one fused parameter. Here the same mapping runs on the keys of a single expert, against a model
on the meta device whose experts modules hold one expert.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(kw_only=True)
class ParameterSource:
    """The checkpoint keys of a fused parameter of one experts module."""

    parameter: str  # qualified name in the model: model.layers.0.mlp.experts.gate_up_proj
    converter: Any = None  # a WeightConverter, or None for a plain (possibly renamed) key
    keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # source pattern -> keys, by expert

    @property
    def is_per_expert(self) -> bool:
        """Whether every expert has keys of its own. Otherwise each key holds the rows of all experts."""
        return self.converter is not None and any(isinstance(op, MergeModulelist) for op in self.converter.operations)


def expert_sources(
    model: PreTrainedModel, keys: Iterable[str], names: Iterable[str]
) -> dict[str, list[ParameterSource]]:
    """Returns the sources of each experts module's parameters among the checkpoint's keys, by qualified module name."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    owner = {
        f"{name}.{p}": name for name in names for p, _ in model.get_submodule(name).named_parameters(recurse=False)
    }

    sources: dict[str, ParameterSource] = {}
    for key in sorted(keys, key=dot_natural_key):
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if renamed not in parameters and key in parameters:
            renamed, pattern = key, None
        if renamed not in owner:
            continue
        source = sources.setdefault(
            renamed, ParameterSource(parameter=renamed, converter=None if pattern is None else converter_of[pattern])
        )
        source.keys[key if pattern is None else pattern].append(key)

    by_module: dict[str, list[ParameterSource]] = {name: [] for name in names}
    for parameter, source in sources.items():
        by_module[owner[parameter]].append(source)
    return by_module


def unknown_keys(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """Returns the checkpoint keys that map to no parameter or buffer of the model."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()

    def is_known(key: str) -> bool:
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        return renamed in parameters or key in parameters

    return [key for key in sorted(keys, key=dot_natural_key) if not is_known(key)]


def convert_rows(
    model: PreTrainedModel, source: ParameterSource, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns one expert's rows: qualified parameter name -> row without the expert dimension.

    tensors: source pattern -> the expert's own tensor, or a slice [1, ...] where the key holds all experts.
    """
    if source.converter is None:
        (value,) = tensors.values()
        return {source.parameter: value[0]}
    converter = copy.deepcopy(source.converter)
    for pattern, tensor in tensors.items():
        converter.add_tensor(source.parameter, source.parameter, pattern, tensor)
    converted = converter.convert(source.parameter, model=model, config=model.config)
    return {name: _single(value)[0] for name, value in converted.items()}


def rows_to_checkpoint(model: PreTrainedModel, rows: Mapping[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Converts one expert from (qualified parameter name -> row) to (checkpoint key -> tensor): the inverse of reading.

    Families with per-expert keys get this expert's keys. Families that have only fused keys (gpt-oss, GraniteMoE) get
    those keys with a slice [1, ...]; the slices of all experts, concatenated in order, are the checkpoint's tensor.
    """
    fused = {name: row.unsqueeze(0) for name, row in rows.items()}
    reverted = revert_weight_conversion(model, fused)
    return {_renumber(key, index): value.contiguous() for key, value in reverted.items()}


def _renumber(key: str, index: int) -> str:
    """Replaces the index 0 that converting a single expert gives. A fused key has no number after `experts`."""
    return re.sub(r"(\bexperts\.)0(?=\.)", rf"\g<1>{index}", key)


def trunk_to_checkpoint(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the trunk's parameters under their checkpoint keys (the inverse of loading).

    A prefix that loading removed, as in multimodal checkpoints, stays removed: the config that is written is that of
    the language model alone, and `rows_to_checkpoint` adds no prefix either.
    """
    bare = copy.copy(model)
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is not None:
        vars(bare)["_weight_conversions"] = [entry for entry in loaded if not isinstance(entry, PrefixChange)] or None
    return dict(revert_weight_conversion(bare, dict(state)))


def _single(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor

"""Writes a checkpoint directory: trunk, experts (streamed layer by layer), tokenizer, training state."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moecluster.errors import StateLost
from moecluster.models.checkpoint.reader import INDEX_NAME
from moecluster.models.checkpoint.training_progress import FOLDER, TrainingState, write_training_state
from moecluster.models.checkpoint.training_state import (
    CARRIED_NAME,
    TRUNK_WEIGHTS_NAME,
    expert_optimizer_file,
    expert_weights_name,
    trunk_optimizer_file,
)
from moecluster.models.experts.layout import ExpertLayout
from moecluster.models.trunk import checkpoint_state
from moecluster.optim.two_phase import state_names
from moecluster.rpc.expert.interface import ExportedTensor
from moecluster.training.carried import carry_over
from moecluster.training.tensor_file import TensorFile, write_tensors
from moecluster.types import ExpertId, OptimizerSettings

OPTIMIZER_PREFIX = "optimizer/"  # in the names of exported tensors
# Streams all tensors of the given experts, one expert after the other.
ExportExperts = Callable[[Sequence[ExpertId]], Iterator[ExportedTensor]]


@dataclass(frozen=True, kw_only=True)
class CheckpointContent:
    """The contents of a checkpoint."""

    state: TrainingState
    trunk: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: ExpertLayout
    expert_dtype: torch.dtype
    export: ExportExperts
    optimizer: OptimizerSettings | None = None  # None: nothing is trained yet, so there is no optimizer state
    trunk_optimizer: Mapping[str, torch.Tensor] | None = None
    carried_from: Path | None = None  # the checkpoint whose tensors outside trunk and experts are carried over


def fill_checkpoint(directory: Path, content: CheckpointContent) -> None:
    """Writes the whole checkpoint. Holds the trunk and one expert at a time in memory.

    Raises OSError; StateLost if an expert is missing from the export.
    """
    (directory / FOLDER).mkdir()
    _write_config(directory, content.trunk)
    content.tokenizer.save_pretrained(directory)
    trunk = checkpoint_state(content.trunk)
    total_bytes = write_tensors(directory / TRUNK_WEIGHTS_NAME, trunk)
    weight_map = dict.fromkeys(trunk, TRUNK_WEIGHTS_NAME)
    if content.trunk_optimizer is not None:
        write_tensors(trunk_optimizer_file(directory), content.trunk_optimizer)
    for layer in content.layout.layers:
        shapes = content.layout.layer_shapes(layer.layer)
        total_bytes += _write_layer(directory, content, layer.layer, shapes)
        weight_map |= dict.fromkeys(shapes, expert_weights_name(layer.layer))
    if content.carried_from is not None:
        carried = carry_over(content.carried_from, directory, content.layout)
        total_bytes += sum(carried.values())
        weight_map |= dict.fromkeys(carried, CARRIED_NAME)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    write_training_state(directory, content.state)


def _write_config(directory: Path, trunk: PreTrainedModel) -> None:
    config = copy.deepcopy(trunk.config)
    config.architectures = [type(trunk).__name__]
    config.save_pretrained(directory)
    if trunk.generation_config is not None:
        trunk.generation_config.save_pretrained(directory)


def _write_layer(directory: Path, content: CheckpointContent, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Writes the weights and optimizer state of a layer's experts. Returns the bytes of the weights."""
    experts = content.layout.experts_of(layer)
    first = content.layout.checkpoint_state(experts[0], content.layout.parameters(experts[0]))
    by_row = {key for key, value in first.items() if tuple(value.shape) != shapes[key]}
    with TensorFile(
        directory / expert_weights_name(layer), shapes, dict.fromkeys(shapes, content.expert_dtype), by_row=by_row
    ) as weights:
        state_shapes, state_dtypes = _optimizer_layout(content, experts)
        if state_shapes:
            with TensorFile(expert_optimizer_file(directory, layer), state_shapes, state_dtypes) as states:
                _write_experts(content, experts, weights, states)
        else:
            _write_experts(content, experts, weights, None)
        return weights.content_bytes


def _write_experts(
    content: CheckpointContent, experts: Sequence[ExpertId], weights: TensorFile, states: TensorFile | None
) -> None:
    written = Counter[ExpertId]()
    for expert, exported in groupby(content.export(experts), key=lambda tensor: tensor.expert):
        parameters = dict(_parameters(exported, expert, states))
        for key, value in content.layout.checkpoint_state(expert, parameters).items():
            weights.write(key, value, row=expert.index)
        written[expert] += 1
    if set(written) != set(experts) or max(written.values()) > 1:
        missing = ", ".join(str(e) for e in experts if written[e] != 1)
        raise StateLost(f"experts {missing} were not exported as they should be")


def _parameters(
    exported: Iterable[ExportedTensor], expert: ExpertId, states: TensorFile | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields an expert's parameters, and writes its optimizer state to the file as it arrives."""
    for tensor in exported:
        if not tensor.name.startswith(OPTIMIZER_PREFIX):
            yield tensor.name, tensor.value
        elif states is not None:
            states.write(f"{expert.index}/{tensor.name.removeprefix(OPTIMIZER_PREFIX)}", tensor.value)


def _optimizer_layout(
    content: CheckpointContent, experts: Sequence[ExpertId]
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Returns the shapes and dtypes of the experts' optimizer state.

    The state of an expert that has never been stepped stays zero, which is what both optimizers start with.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    kinds = state_names(content.optimizer) if content.optimizer is not None else ()
    for expert in experts:
        for parameter, value in content.layout.parameters(expert).items():
            for kind in kinds:
                key = f"{expert.index}/{kind}/{parameter}"
                shapes[key] = () if kind == "step" else tuple(value.shape)
                dtypes[key] = torch.float32 if kind == "step" else content.expert_dtype
    return shapes, dtypes

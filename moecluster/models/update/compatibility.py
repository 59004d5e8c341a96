"""Checks whether one checkpoint can replace another: same layers, experts and widths."""

from pathlib import Path

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.experts.source import ExpertSource
from moecluster.types import ExpertId


def check_same_shape(served: str | Path | Checkpoint, wanted: str | Path | Checkpoint) -> None:
    """Reads headers only. Raises CheckpointError, in one line, if `wanted` is incomplete or its shapes differ from
    those of `served`; UnsupportedModelError if its family is not supported."""
    new, old = ExpertSource(wanted), ExpertSource(served)
    wanted, served = new.checkpoint.path, old.checkpoint.path
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        is_, was = new.checkpoint.text_config().get(key), old.checkpoint.text_config().get(key)
        if is_ != was:
            raise CheckpointError(f"{wanted} is of another model than {served}: {key} is {is_}, not {was}")
    if sizes(new) != sizes(old):
        raise CheckpointError(
            f"{wanted} is of another model than {served}: its experts (layer: number) are {_shown(new)}, "
            f"not {_shown(old)}"
        )
    for layer in old.layers:
        first = ExpertId(layer=layer.layer, index=0)
        is_, was = _shapes(new, first), _shapes(old, first)
        if is_ != was:
            raise CheckpointError(
                f"{wanted} is of another model than {served}: the experts of layer {layer.layer} have shapes "
                f"{_listed(is_)}, not {_listed(was)}"
            )
    if new.checkpoint.tensors.keys() == old.checkpoint.tensors.keys():  # another layout is checked when it is loaded
        for key, info in sorted(old.checkpoint.tensors.items()):
            shape = new.checkpoint.info(key).shape
            if shape != info.shape:
                raise CheckpointError(f"{key} in {wanted} has shape {list(shape)}, in {served} {list(info.shape)}")


def sizes(source: ExpertSource) -> dict[int, int]:
    """Returns MoE layer -> number of experts."""
    return {layer.layer: layer.num_experts for layer in source.layers}


def _shapes(source: ExpertSource, expert: ExpertId) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in source.empty(expert).named_parameters()}


def _shown(source: ExpertSource) -> str:
    shown = ", ".join(f"{layer}: {count}" for layer, count in sorted(sizes(source).items())[:4])
    return f"{shown}, ..." if len(source.layers) > 4 else shown


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))

"""params: counts a model's parameters from its configuration alone."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moecluster.cli.common.model_target import read_target
from moecluster.cli.common.tables import make_table, show_table
from moecluster.models.description import ModelDescription, describe
from moecluster.models.native.build import register_native_family
from moecluster.models.native.configuration import native_config


def params(target: str, settings: Sequence[str], console: Console) -> None:
    """Shows total and active parameters of a model directory (its config.json is enough) or of a preset."""
    config = read_target(target, settings)
    register_native_family()
    described = describe(Path(config.model.path) if config.model.path else native_config(config.model))
    console.print(f"{target}: {described.family}, a Mixture of Experts", highlight=False, markup=False)
    show_table(_table(described), console)


def _table(model: ModelDescription) -> Table:
    table = make_table("", "value", prose=("", "value"), show_header=False)
    for name, value in (
        ("layers (with experts)", f"{model.num_layers} ({model.num_moe_layers})"),
        ("experts per layer, active per token", f"{model.num_experts}, {model.top_k}"),
        ("width", str(model.hidden_size)),
        ("parameters of one expert", _figure(model.expert_parameters)),
        ("total parameters", _figure(model.total_parameters)),
        ("active parameters per token", _figure(model.active_parameters)),
    ):
        table.add_row(name, value)
    return table


def _figure(count: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f} {unit} ({count:,})"
    return f"{count:,}"

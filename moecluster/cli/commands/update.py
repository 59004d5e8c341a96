"""update: replaces weights of a running cluster; for a partial update it first composes a complete checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from actors import cluster_file
from actors.launch import give_directory
from moecluster.cli.commands import operations
from moecluster.cli.common.cluster_choice import ClusterChoice
from moecluster.cli.common.live_controller import LiveController
from moecluster.cli.common.lookup import found
from moecluster.errors import CheckpointError, ConfigError
from moecluster.types import ControllerStatus, OperationPhase


def update(
    choice: ClusterChoice,
    directory: str,
    experts: Sequence[str],
    keep_trunk: bool,
    out: str,
    operation_id: str,
    wait: bool,
    console: Console,
) -> None:
    """Replaces all weights by those of a directory; or only some experts, with or without the trunk.

    A cluster at an address must have been given the directory, which this host need not see.
    """
    partial = bool(experts or keep_trunk)
    if out and not partial:
        raise ConfigError("--out: nothing is put together without --experts or --keep-trunk")
    if choice.address and not partial:
        if not Path(directory).is_absolute():
            raise ConfigError(f"DIR: got {directory}, expected an absolute path, as the nodes of {choice} see it")
        operations.update(choice, directory, operation_id, wait, console)
        return
    if not Path(directory).is_dir():
        raise CheckpointError(f"no model directory at {directory}: give a directory with config.json and safetensors")
    checkpoint = Path(directory).resolve()
    if partial:
        checkpoint = _put_together(choice, checkpoint, experts, keep_trunk, out, console)
    if choice.address:
        operations.update(choice, str(checkpoint), operation_id, wait, console)
        return
    give_directory(found(choice.name), str(checkpoint))
    operation = operations.update(choice, str(checkpoint), operation_id, wait, console)
    noted = cluster_file.load(choice.name)
    if noted is not None and operation.phase is OperationPhase.DONE:
        cluster_file.save(replace(noted, model=str(checkpoint)))


def _put_together(
    choice: ClusterChoice, directory: Path, experts: Sequence[str], keep_trunk: bool, out: str, console: Console
) -> Path:
    # Reading checkpoints imports torch, which other commands need not wait for.
    from moecluster.models.experts.source import ExpertSource
    from moecluster.models.update.compatibility import sizes
    from moecluster.models.update.compose import compose
    from moecluster.placement.expert_ids import experts_named
    from moecluster.placement.initial import all_experts

    with LiveController(choice) as controller:
        seen = controller.ask(lambda calls: calls.status())
    known = sizes(ExpertSource(directory))
    named = {expert for pattern in experts for expert in experts_named(pattern, known, "--experts")}
    taken = named or set(all_experts(known))
    path = Path(out).resolve() if out else _beside(seen)
    with console.status(f"putting {path} together"):
        compose(seen.checkpoint, directory, path, experts=taken, keep_trunk=keep_trunk)
    trunk = "" if keep_trunk else " and the trunk"
    console.print(f"{path}: {len(taken)} experts{trunk} out of {directory}, all else out of {seen.checkpoint}")
    return path


def _beside(seen: ControllerStatus) -> Path:
    """Returns an unused path next to the directory that is served."""
    served = Path(seen.checkpoint)
    stem = served.name.rpartition("-v")[0] if served.name.rpartition("-v")[2].isdecimal() else served.name
    version = seen.weight_version + 1
    while (path := served.with_name(f"{stem or served.name}-v{version}")).exists():
        version += 1
    return path

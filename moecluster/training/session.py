"""A training session: trunk and experts loaded from one checkpoint, under a new term. Starts, resumes and rollbacks
open one."""

import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moecluster.config import Config
from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import ConfigError, MoeClusterError, StateLost, Unavailable, UserError
from moecluster.models.checkpoint.training_progress import TrainingState, read_training_state
from moecluster.models.checkpoint.training_state import read_trunk_optimizer_state
from moecluster.models.trunk import load_trunk
from moecluster.rpc.expert.interface import ExpertControl
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.training.coordinator import StepCoordinator
from moecluster.training.trunk_participant import TrunkParticipant
from moecluster.types import ExpertId, OptimizerSettings, Placement

POLL_AGAIN_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Session:
    """Trunk, experts and coordinator, all at one committed step. Invalid as soon as one of them is lost."""

    checkpoint: Path
    state: TrainingState  # read from the checkpoint
    term: int
    model: PreTrainedModel
    trunk: TrunkParticipant
    controls: Mapping[str, ExpertControl]
    placement: Placement
    coordinator: StepCoordinator


def optimizer_settings(config: Config) -> OptimizerSettings:
    """Returns the optimizer settings that trunk and experts share."""
    return OptimizerSettings(
        name=config.experts.optimizer,
        beta1=config.train.betas[0],
        beta2=config.train.betas[1],
        eps=config.train.eps,
        weight_decay=config.train.weight_decay,
        momentum=config.experts.momentum,
    )


def open_session(remote: RemoteExperts, checkpoint: Path, config: Config) -> Session:
    """Loads a checkpoint into a trunk and every expert actor. Waits for a placement that has all experts.

    Raises UserError if the checkpoint cannot be used, StateLost if that fails within cluster.start_timeout_s.
    """
    state = read_training_state(checkpoint) or TrainingState(step=0, data_position=0, term=0, settings={})
    model = load_trunk(checkpoint, remote, getattr(torch, config.model.dtype))
    model.train()
    until_s = time.monotonic() + config.cluster.start_timeout_s
    while True:
        try:
            return _load_everywhere(remote, checkpoint, config, state, model)
        except UserError:
            raise
        except MoeClusterError as error:  # an actor died or the controller changed: try again
            if time.monotonic() > until_s:
                raise StateLost(f"training cannot go on from {checkpoint}: {error}") from error
            time.sleep(POLL_AGAIN_S)


def _load_everywhere(
    remote: RemoteExperts, checkpoint: Path, config: Config, state: TrainingState, model: PreTrainedModel
) -> Session:
    placement = remote.pool.placement(config.cluster.start_timeout_s)
    _check(remote.pool, placement)
    controls = {name: control for name, control in remote.pool.controls().items() if placement.experts_on(name)}
    if not controls.keys() <= placement.actors.keys():
        raise Unavailable("the placement changed")
    # A higher term fences earlier training runs over these experts.
    seen = [control.status().training_term for control in controls.values()]
    term = max(state.term, *seen) + 1
    optimizer = optimizer_settings(config)

    def load(name: str) -> None:
        controls[name].load(
            LoadRequest(
                term=placement.term,
                experts=placement.experts_on(name),
                checkpoint=str(checkpoint.resolve()),
                dtype=config.model.dtype,
                optimizer=optimizer,
                replace=True,
                training_term=term,
                timeout_s=config.cluster.start_timeout_s,
            )
        )

    with ThreadPoolExecutor(max_workers=len(controls)) as pool:
        list(pool.map(load, controls))
    optimizer_state = read_trunk_optimizer_state(checkpoint)
    trunk = TrunkParticipant(model, optimizer, state=state, optimizer_state=optimizer_state, term=term)
    coordinator = StepCoordinator(
        {**controls, trunk.name: trunk},
        term=term,
        max_grad_norm=config.train.max_grad_norm,
        repeat_s=config.train.participant_timeout_s,
    )
    try:
        coordinator.recover()
    except MoeClusterError:
        coordinator.close()
        raise
    return Session(
        checkpoint=checkpoint,
        state=state,
        term=term,
        model=model,
        trunk=trunk,
        controls=controls,
        placement=placement,
        coordinator=coordinator,
    )


def _check(pool: ExpertPool, placement: Placement) -> None:
    """Checks that every expert has exactly one replica.

    Raises Unavailable if an expert has none, after asking for it; ConfigError if an expert has several.
    """
    replicas = Counter(replica.expert for replica in placement.replicas)
    experts = [ExpertId(layer=layer, index=i) for layer, n in placement.layer_experts.items() for i in range(n)]
    missing = [expert for expert in experts if not replicas[expert]]
    if missing:
        for layer in sorted({expert.layer for expert in missing}):  # cold experts are loaded only on request
            pool.want(layer, [expert.index for expert in missing if expert.layer == layer])
        raise Unavailable(f"{len(missing)} experts are not served, the first {missing[0]}")
    several = [expert for expert in experts if replicas[expert] > 1]
    if several:
        raise ConfigError(f"controller.placement: expert {several[0]} has several replicas; training takes one of each")

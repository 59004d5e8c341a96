"""One rank's part of a step attempt: forward and backward of its micro-batches through trunk and remote experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.models.native.modeling import NativeForCausalLM
from moecluster.training.session import Session
from moecluster.types import StepTag

FOREIGN_AUX_LOSS = "router_aux"  # the auxiliary loss of transformers' own families


@dataclass(frozen=True, kw_only=True)
class Computed:
    """Losses and loads of an attempt. The gradients stay with the participants."""

    loss: float  # cross-entropy, mean over micro-batches, nats per token
    aux_losses: Mapping[str, float]  # kind -> auxiliary loss times its coefficient, mean over micro-batches
    loads: Mapping[int, np.ndarray]  # MoE layer -> assignments per expert, int64 [E]


def compute_gradients(
    session: Session, remote: RemoteExperts, tag: StepTag, ids_BS: torch.Tensor, *, micro_batches: int, seed: int
) -> Computed:
    """Runs forward and backward of one step's sequences.

    Raises AttemptAborted or StateLost if an actor does not answer.
    """
    session.trunk.drop_gradients()
    total, aux_totals = 0.0, dict[str, float]()
    with remote.counting() as counts:
        for micro_batch, part_BS in enumerate(ids_BS.chunk(micro_batches)):
            seed_random_numbers(session.model, seed=seed, step=tag.step, micro_batch=micro_batch)
            with remote.training(tag, rank=0, micro_batch=micro_batch):
                output = session.model(input_ids=part_BS, labels=part_BS, use_cache=False)
                (output.loss / micro_batches).backward()
            session.trunk.accumulate(tag, micro_batch=micro_batch, rows=part_BS.numel())
            cross_entropy, aux_losses = loss_parts(session.model, output)
            total += cross_entropy
            for kind, value in aux_losses.items():
                aux_totals[kind] = aux_totals.get(kind, 0.0) + value
    return Computed(
        loss=total / micro_batches,
        aux_losses={kind: value / micro_batches for kind, value in aux_totals.items()},
        loads=counts.snapshot(),
    )


def loss_parts(model: PreTrainedModel, output: Any) -> tuple[float, dict[str, float]]:
    """Returns (cross-entropy, kind -> auxiliary loss times its coefficient) of a forward call with labels.

    transformers' own families add one auxiliary loss of their gates if config.output_router_logits is set.
    """
    if isinstance(model, NativeForCausalLM):
        parts = model.last_losses
        assert parts.cross_entropy is not None, "the call had no labels"
        return float(parts.cross_entropy), {kind: float(loss) for kind, loss in parts.aux_losses.items()}
    loss, aux_loss = float(output.loss.detach()), getattr(output, "aux_loss", None)
    if aux_loss is None or not getattr(model.config, "output_router_logits", False):
        return loss, {}
    coefficient = float(getattr(model, "router_aux_loss_coef", model.config.router_aux_loss_coef))
    auxiliary = coefficient * float(aux_loss.detach())
    return loss - auxiliary, {FOREIGN_AUX_LOSS: auxiliary}


def seed_random_numbers(model: PreTrainedModel, *, seed: int, step: int, micro_batch: int) -> None:
    """Seeds dropout and gate noise from these numbers, so that a repeated attempt draws the same."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    if isinstance(model, NativeForCausalLM):
        model.begin_micro_batch(seed=seed, step=step, micro_batch=micro_batch)


def update_gates(model: PreTrainedModel, loads: Mapping[int, np.ndarray]) -> None:
    """Passes the loads of a committed step to the gates, for those that balance without a loss."""
    if isinstance(model, NativeForCausalLM):
        for layer, gate in model.gates().items():
            gate.after_step(torch.from_numpy(loads[layer]))

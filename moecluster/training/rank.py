"""One rank's part of an attempt at a step: micro-batches forward and backward through trunk and remote experts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from moecluster.models.own_model import OwnForCausalLM
from moecluster.roles.remote_experts import RemoteExperts
from moecluster.training.session import Session
from moecluster.types import StepTag


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What an attempt's micro-batches gave; the gradients lie with the participants."""

    loss: float  # mean over micro-batches, nats per token, auxiliary losses included
    loads: Mapping[int, np.ndarray]  # MoE layer -> assignments per expert, int64 [E]


def compute_gradients(
    session: Session, remote: RemoteExperts, tag: StepTag, ids_BS: torch.Tensor, *, micro_batches: int, seed: int
) -> Computed:
    """Forward and backward of one step's sequences. Raises AttemptAborted or StateLost if an actor does not answer."""
    session.trunk.drop_gradients()
    total = 0.0
    with remote.counting() as counts:
        for micro_batch, part_BS in enumerate(ids_BS.chunk(micro_batches)):
            seed_random_numbers(session.model, seed=seed, step=tag.step, micro_batch=micro_batch)
            with remote.training(tag, rank=0, micro_batch=micro_batch):
                loss = session.model(input_ids=part_BS, labels=part_BS, use_cache=False).loss
                (loss / micro_batches).backward()
            session.trunk.accumulate(tag, micro_batch=micro_batch, rows=part_BS.numel())
            total += float(loss.detach())
    return Computed(loss=total / micro_batches, loads=counts.snapshot())


def seed_random_numbers(model: PreTrainedModel, *, seed: int, step: int, micro_batch: int) -> None:
    """Makes dropout and gates' noise a function of these numbers, so that an attempt run again draws the same."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    if isinstance(model, OwnForCausalLM):
        model.begin_micro_batch(seed=seed, step=step, micro_batch=micro_batch)


def update_gates(model: PreTrainedModel, loads: Mapping[int, np.ndarray]) -> None:
    """Lets gates that balance without a loss adapt to a committed step's loads."""
    if isinstance(model, OwnForCausalLM):
        for layer, gate in model.gates().items():
            gate.after_step(torch.from_numpy(loads[layer]))

"""Small training runs: settings, text, and the losses of a plain torch loop in one process."""

from pathlib import Path
from typing import Any

import torch

from moecluster.config import Config, read_config
from moecluster.models.native.build import build_model
from moecluster.training.events import Event, StepDone
from moecluster.training.schedule import WarmupCosine
from moecluster.training.setup import read_data, run_tokenizer

WORDS = ["expert", "gate", "trunk", "router", "token", "batch", "actor", "step", "load", "shard"]


def write_text(directory: Path) -> Path:
    """Writes sentences with learnable structure."""
    path = directory / "sentences.txt"
    lines = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 9)) for i in range(400)]
    path.write_text("\n".join(lines))
    return path


def make_config(text: Path, output_dir: Path, *, model: dict[str, Any] | None = None, **train: Any) -> Config:
    tiny = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "num_kv_heads": 1,
        "expert_inner_size": 32,
        "num_experts": 4,
        "initializer_range": 0.1,  # otherwise the experts of so small a model hardly matter at first
    }
    return read_config(
        {
            "model": tiny | (model or {}),
            "train": {
                "data": str(text),
                "output_dir": str(output_dir),
                "steps": 6,
                "batch_size": 4,
                "micro_batches": 2,
                "sequence_length": 32,
                "lr": 3e-3,
                "warmup_steps": 5,
                "checkpoint_every_steps": 2,
                "eval_every_steps": 0,
                "eval_batches": 1,
                "seed": 3,
                "participant_timeout_s": 0.05,
            }
            | train,
        }
    )


def losses(events: list[Event]) -> dict[int, float]:
    """Returns step -> loss, including auxiliary losses; the last one of a repeated step."""
    return {event.step: event.total_loss for event in events if isinstance(event, StepDone)}


def losses_in_one_process(config: Config) -> dict[int, float]:
    """Trains in a plain torch loop, which uses only our model, data and learning-rate schedule."""
    train = config.train
    model = build_model(config.model, train.seed)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=train.betas,
        eps=train.eps,
    )
    schedule = WarmupCosine(
        lr=train.lr, steps=train.steps, warmup_steps=train.warmup_steps, min_lr_ratio=train.min_lr_ratio
    )
    data = read_data(config, run_tokenizer(config))
    found = {}
    for step in range(1, train.steps + 1):
        total = 0.0
        loads = {layer: torch.zeros(gate.num_experts) for layer, gate in model.gates().items()}
        sequences = data.train_batch((step - 1) * train.batch_size, train.batch_size)
        for micro_batch, part in enumerate(sequences.chunk(train.micro_batches)):
            model.begin_micro_batch(seed=train.seed, step=step, micro_batch=micro_batch)
            loss = model(input_ids=part, labels=part).loss
            (loss / train.micro_batches).backward()
            total += loss.item()
            for layer, routing in model.last_routings.items():
                kept = routing.ids_TK[routing.ids_TK < len(loads[layer])]  # the others were dropped
                loads[layer] += torch.bincount(kept, minlength=len(loads[layer]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.step()
        optimizer.zero_grad()
        for layer, gate in model.gates().items():
            gate.after_step(loads[layer])
        found[step] = total / train.micro_batches
    return found


def assert_equal_within(found: dict[int, float], expected: dict[int, float], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    worst = max(expected, key=lambda step: abs(found[step] - expected[step]))
    assert abs(found[worst] - expected[worst]) <= tolerance, (worst, found[worst], expected[worst])

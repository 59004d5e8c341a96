"""Training Hugging Face families from their directories: equal to one process, and saved as ordinary directories.

Their experts are rows of fused parameters. In one process an expert without tokens then has a zero gradient, and decay
and momentum move it; here every expert has its own parameters and must move the same.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moecluster.config import Config, read_config
from moecluster.models.tokenizer.byte_level import VOCAB_SIZE, build_byte_tokenizer
from moecluster.optim.two_phase import is_decayed
from moecluster.training.events import StepDone, WentBack
from moecluster.training.loop import TrainingLoop
from moecluster.training.schedule import WarmupCosine
from moecluster.training.setup import prepare_start, read_data, run_tokenizer
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.models.families import Layout, make_model, save

STEPS = 8


def make_run(family: str, layout: Layout, root: Path, **experts: Any) -> Config:
    """A model directory, a text, and settings under which most steps leave experts without tokens."""
    model = make_model(family)
    model.resize_token_embeddings(VOCAB_SIZE, mean_resizing=False)
    save(model, root / "model", layout)
    build_byte_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text("\n".join(f"the {i}th line of {i * i} lines" for i in range(100)))
    return read_config(
        {
            "model": {"path": str(root / "model")},
            "experts": experts,
            "train": {
                "data": str(root / "text.txt"),
                "output_dir": str(root / "run"),
                "steps": STEPS,
                "batch_size": 1,
                "sequence_length": 4,
                "lr": 1e-2,
                "warmup_steps": 2,
                "eval_every_steps": 0,
                "eval_batches": 1,
                "checkpoint_every_steps": 0,
            },
        }
    )


def losses_in_one_process(config: Config) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """A plain torch loop over the whole model: losses, final weights, and gradients of unvisited experts."""
    train = config.train
    model = AutoModelForCausalLM.from_pretrained(config.model.path, experts_implementation="eager")
    model.train()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if is_decayed(n, p)], "weight_decay": train.weight_decay},
        {"params": [p for n, p in named if not is_decayed(n, p)], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if config.experts.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.experts.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=train.betas, eps=train.eps)
    schedule = WarmupCosine(lr=train.lr, steps=STEPS, warmup_steps=train.warmup_steps, min_lr_ratio=train.min_lr_ratio)
    data = read_data(config, run_tokenizer(config))
    losses, unvisited = [], 0
    for step in range(1, STEPS + 1):
        ids = data.train_batch(step - 1, 1)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        grads = [p.grad for n, p in named if n.endswith("experts.down_proj") and p.grad is not None]
        unvisited += sum(int((grad.flatten(1) == 0).all(1).count_nonzero()) for grad in grads)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict(), unvisited


@pytest.mark.parametrize(
    ("family", "layout", "experts"),
    [
        ("mixtral", "per-expert", {}),
        ("mixtral", "fused", {"optimizer": "sgd", "momentum": 0.9}),
        ("gpt_oss", "fused", {}),
        ("qwen3_moe", "per-expert", {"optimizer": "sgd"}),
    ],
)
def test_a_family_trains_as_in_one_process(tmp_path, family, layout, experts):
    config = make_run(family, layout, tmp_path, **experts)
    expected, weights, unvisited = losses_in_one_process(config)
    assert unvisited > 0
    start, tokenizer = prepare_start(config), run_tokenizer(config)
    with ExpertCluster(start, num_actors=3) as cluster:
        loop = TrainingLoop(config, cluster.remote, start=start, data=read_data(config, tokenizer), tokenizer=tokenizer)
        events = list(loop.run())
        loop.close()
    assert not any(isinstance(event, WentBack) for event in events)
    found = [event.total_loss for event in events if isinstance(event, StepDone)]
    assert found == pytest.approx(expected, abs=1e-5)

    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}"
    trained = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    for name, value in weights.items():
        # AdamW divides by the gradient's magnitude, so rounding of tiny gradients is amplified.
        assert (trained[name] - value).abs().max() <= 1e-4, name


def test_experts_of_a_checkpoint_stand_by_layer(tmp_path):
    """A family with only fused keys gets whole fused tensors, although experts were written one by one."""
    config = make_run("gpt_oss", "fused", tmp_path)
    start, tokenizer = prepare_start(config), run_tokenizer(config)
    with ExpertCluster(start, num_actors=3) as cluster:
        loop = TrainingLoop(config, cluster.remote, start=start, data=read_data(config, tokenizer), tokenizer=tokenizer)
        list(loop.run())
        loop.close()
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}"
    with safe_open(str(checkpoint / "model-layer-001-experts.safetensors"), framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # it is no dict
    assert {shape[0] for shape in shapes.values()} == {4}
    assert all(key.startswith("model.layers.1.mlp.experts.") for key in shapes)

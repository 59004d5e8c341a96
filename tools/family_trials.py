"""Tries a family of transformers on a tiny model: are results equal with external experts, and how is it batched?

Everything runs in this process, with the code that actors and routers run.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moecluster.config import Config, read_config
from moecluster.errors import UserError
from moecluster.hf.continuous_batching import supports_paging
from moecluster.hf.padding import sees_padding
from moecluster.models.config import read_loadable_config
from moecluster.models.experts.layout import ExpertLayout
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.models.trunk import load_trunk
from moecluster.optim.two_phase import is_decayed
from moecluster.training.data import TextData
from moecluster.training.events import StepDone
from moecluster.training.loop import TrainingLoop
from moecluster.training.schedule import WarmupCosine
from moecluster.training.setup import prepare_start, read_data, run_tokenizer
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.models.families import draw_weights
from tests.support.models.parity import LocalExperts
from tools.tiny_configs import tiny_config

LOGIT_TOLERANCE = 1e-5  # float32
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4
STEPS = 3
BATCH_SIZE = 2
NEW_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The result for a family."""

    family: str  # its model_type
    experts: str  # "equal", "refused", "failed" or "differs"; unless equal, training and batching are empty
    training: str = ""  # "equal", or why not
    batching: str = ""  # "continuous", "padded", "padded, equal lengths", or "padded" with a remark
    reason: str = ""  # why experts is not "equal"

    def to_table(self) -> dict[str, str]:
        return {name: value for name, value in asdict(self).items() if value}


def try_family(family: str, directory: Path) -> Trial:
    """directory: must be empty. Catches whatever a family's code raises."""
    refusal = refusal_of(family, directory / "refused")
    if refusal is not None:
        return Trial(family=family, experts="refused", reason=refusal)
    model_dir = directory / "model"
    try:
        save_tiny(family, model_dir)
        difference = logit_difference(model_dir)
    except Exception as error:
        return Trial(family=family, experts="failed", reason=_told(error))
    if difference > LOGIT_TOLERANCE:
        return Trial(family=family, experts="differs", reason=f"logits by {difference:.1e}")
    return Trial(
        family=family, experts="equal", training=training(model_dir, directory / "run"), batching=batching(model_dir)
    )


def refusal_of(family: str, directory: Path) -> str | None:
    """Returns the error that moecluster refuses a model directory of this family with; None if it accepts it."""
    CONFIG_MAPPING[family]().save_pretrained(directory)
    try:
        ExpertLayout(read_loadable_config(directory))
    except UserError as error:
        reason = str(error)
        try:  # the default config of some families has no experts, or lacks settings
            tiny_config(family).save_pretrained(directory)
            ExpertLayout(read_loadable_config(directory))
        except Exception:
            return reason
    return None


def save_tiny(family: str, directory: Path) -> None:
    """Writes a whole random model of the family, as it would be published."""
    torch.manual_seed(0)
    model = _whole(tiny_config(family))
    draw_weights(model)
    model.save_pretrained(directory)
    build_byte_tokenizer().save_pretrained(directory)


def _whole(config: PreTrainedConfig) -> PreTrainedModel:
    if config.sub_configs:  # AutoModelForCausalLM would leave out vision and audio parts
        for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            if auto._model_mapping.get(type(config), None) is not None:
                whole: PreTrainedModel = auto.from_config(config)
                return whole
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def logit_difference(directory: Path) -> float:
    """Returns the largest logit difference to transformers' own model."""
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    ours = load_trunk(directory, LocalExperts(directory))
    with torch.no_grad():
        return float((ours(ids).logits - theirs(ids).logits).abs().max())


def batching(directory: Path) -> str:
    """Returns how the family is batched, with a remark if padding changes its outputs."""
    model = load_trunk(directory, LocalExperts(directory))
    model.eval()
    if supports_paging(model):
        return "continuous"
    if sees_padding(model.config):
        return "padded, equal lengths"
    return "padded" if padding_changes_nothing(model) else "padded, and padding changes the text"


def padding_changes_nothing(model: Any) -> bool:
    """Whether a left-padded sequence has the same logits as alone, after the prompt and while decoding on a cache."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        short, long = (torch.randint(3, 250, (1, n), generator=generator) for n in (5, 21))
        ids = torch.cat([torch.cat([torch.zeros(1, 16, dtype=torch.long), short], dim=1), long])
        mask = torch.ones_like(ids)
        mask[0, :16] = 0
        asked: dict[str, Any] = {
            "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0,
            "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None,
        }  # fmt: skip
        with torch.no_grad():
            alone = model.generate(short, attention_mask=torch.ones_like(short), **asked).logits
            together = model.generate(ids, attention_mask=mask, **asked).logits
        if any((a[0] - b[0]).abs().max() > 1e-4 for a, b in zip(alone, together, strict=True)):
            return False
    return True


def training(directory: Path, run: Path) -> str:
    """Trains a few steps. Returns "equal" if losses and weights are those of a plain loop over transformers' own model,
    else what differs."""
    try:
        config = _run_config(directory, run)
        start, tokenizer = prepare_start(config), run_tokenizer(config)
        with ExpertCluster(start, num_actors=2) as cluster:
            data = read_data(config, tokenizer)
            loop = TrainingLoop(config, cluster.remote, start=start, data=data, tokenizer=tokenizer)
            losses = [event.total_loss for event in loop.run() if isinstance(event, StepDone)]
            loop.close()
        expected, weights = _plain_training(config, data)
        checkpoint = run / "out" / "checkpoints" / f"step-{STEPS:08d}"
        loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
        trained, report = loaded
        state = trained.state_dict()
        served = logit_difference(checkpoint)
    except Exception as error:
        return _told(error)
    if missing := report["missing_keys"]:
        return f"its checkpoint has no {sorted(missing)[0]}"
    if not (difference := _furthest(losses, expected)) <= LOSS_TOLERANCE:
        again, _ = _plain_training(config, data)
        if _furthest(again, expected) > LOSS_TOLERANCE:
            return "runs; it draws at random, so no two runs have equal losses"
        return f"losses differ by {difference:.1e}"
    if not served <= LOGIT_TOLERANCE:
        return f"logits of its checkpoint differ by {served:.1e}"
    furthest = max((float((state[name] - value).abs().max()), name) for name, value in weights.items())
    return "equal" if furthest[0] <= WEIGHT_TOLERANCE else f"{furthest[1]} differs by {furthest[0]:.1e}"


def _furthest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _run_config(directory: Path, run: Path) -> Config:
    run.mkdir()
    (run / "text.txt").write_text("\n".join(f"the {i}th line of {i * i} lines" for i in range(100)))
    train = {
        "data": str(run / "text.txt"), "output_dir": str(run / "out"), "steps": STEPS, "batch_size": BATCH_SIZE,
        "sequence_length": 8, "lr": 1e-3, "warmup_steps": 1, "eval_every_steps": 0, "eval_batches": 1,
        "checkpoint_every_steps": 0,
    }  # fmt: skip
    return read_config({"model": {"path": str(directory)}, "experts": {"optimizer": "sgd"}, "train": train})


def _plain_training(config: Config, data: TextData) -> tuple[list[float], Mapping[str, torch.Tensor]]:
    train = config.train
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32, experts_implementation="eager")
    model.train()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if is_decayed(n, p)], "weight_decay": train.weight_decay},
        {"params": [p for n, p in named if not is_decayed(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.experts.momentum)
    schedule = WarmupCosine(lr=train.lr, steps=STEPS, warmup_steps=train.warmup_steps, min_lr_ratio=train.min_lr_ratio)
    losses = []
    for step in range(1, STEPS + 1):
        ids = data.train_batch((step - 1) * BATCH_SIZE, BATCH_SIZE)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, copy.deepcopy(model.state_dict())


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"

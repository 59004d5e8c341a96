"""The inputs of a run, prepared before any actor exists: first checkpoint, text and tokenizer."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moecluster.config import Config
from moecluster.errors import CheckpointError, ConfigError
from moecluster.models.checkpoint.training_progress import TrainingState, read_training_state
from moecluster.models.config import read_loadable_config
from moecluster.models.experts.layout import ExpertLayout
from moecluster.models.native.build import build_expert, build_model
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.models.tokenizer.load import load_tokenizer
from moecluster.rpc.expert.interface import ExportedTensor
from moecluster.training.checkpoint_store import CHECKPOINTS, CheckpointStore
from moecluster.training.checkpoint_writer import CheckpointContent, fill_checkpoint
from moecluster.training.corpus import read_domains
from moecluster.training.data import TextData
from moecluster.types import ExpertId

# [train] settings that cannot change when a run resumes.
_FIXED = ("data", "tokenizer", "batch_size", "sequence_length", "seed")
_PATHS = ("model.path", "train.data", "train.tokenizer")


def prepare_start(config: Config) -> Path:
    """Returns the checkpoint directory that training starts or resumes from. Writes a fresh model if there is none.

    Raises UserError if there are checkpoints and train.resume is not set, if their settings differ, or if the model or
    tokenizer cannot be used.
    """
    store = CheckpointStore(Path(config.train.output_dir) / CHECKPOINTS)
    latest = store.latest()
    steps = store.steps()
    if steps and steps[-1] > 0 and not config.train.resume:  # step 0 is a fresh model, not a run: `up` writes one too
        raise ConfigError(
            f"train.output_dir: {config.train.output_dir} holds checkpoints up to step {steps[-1]}; "
            "set train.resume = true to go on from there, or choose another directory"
        )
    if latest is not None:
        _check_same_run(latest, config)
        return latest
    tokenizer = run_tokenizer(config)
    if config.model.path:
        vocab_size = read_loadable_config(config.model.path).get_text_config().vocab_size
        _check_vocabulary(tokenizer, vocab_size, f"the model in {config.model.path}")
        return Path(config.model.path)
    _check_vocabulary(tokenizer, config.model.vocab_size, "model.vocab_size")
    return store.write(0, lambda directory: fill_checkpoint(directory, _fresh(config, tokenizer)))


def run_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of train.tokenizer, else of model.path, else a byte tokenizer. Raises CheckpointError."""
    directory = config.train.tokenizer or config.model.path
    return load_tokenizer(directory) if directory else build_byte_tokenizer()


def read_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> TextData:
    """Reads and tokenizes the run's text. Raises DataError, and ConfigError if model.dtype cannot be trained in."""
    if config.model.dtype == "float16":
        raise ConfigError(
            'model.dtype: got "float16", whose gradients vanish; expected float32 or bfloat16 to train in'
        )
    return TextData(
        read_domains(config.train.data, max_skipped_share=config.train.max_skipped_share),
        tokenizer,
        sequence_length=config.train.sequence_length,
        seed=config.train.seed,
    )


def fixed_settings(config: Config) -> dict[str, Any]:
    """Returns "section.key" -> JSON value of all settings that cannot change during a run."""
    tables = config.to_tables()
    fixed = {f"model.{key}": value for key, value in tables["model"].items()}
    fixed |= {f"experts.{key}": tables["experts"][key] for key in ("optimizer", "momentum")}
    fixed |= {f"train.{key}": tables["train"][key] for key in _FIXED}
    plain: dict[str, Any] = json.loads(json.dumps(fixed))
    return plain


def _check_same_run(checkpoint: Path, config: Config) -> None:
    state = read_training_state(checkpoint)
    if state is None:
        raise CheckpointError(f"{checkpoint} has no training state: training cannot go on from it")
    for name, value in fixed_settings(config).items():
        if name in state.settings and not _equal(name, value, state.settings[name]):
            raise ConfigError(
                f"{name}: got {value!r}, but {checkpoint} was trained with {state.settings[name]!r}; "
                "a run goes on with the settings it began with"
            )


def _equal(name: str, value: Any, before: Any) -> bool:
    """Whether a setting is what it was; older runs recorded paths relative to their working directory."""
    if name in _PATHS and value and before:
        return os.path.abspath(str(value)) == os.path.abspath(str(before))
    return bool(value == before)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    if len(tokenizer) > vocab_size:
        raise ConfigError(f"train.tokenizer: it has {len(tokenizer)} token ids, and {where} has room for {vocab_size}")


def _fresh(config: Config, tokenizer: PreTrainedTokenizerBase) -> CheckpointContent:
    """Returns a fresh native model, whose experts are created one at a time."""
    seed = config.train.seed
    trunk = build_model(config.model, seed, with_experts=False)

    def export(experts: Sequence[ExpertId]) -> Iterator[ExportedTensor]:
        for expert in experts:
            for name, parameter in build_expert(config.model, expert, seed).named_parameters():
                yield ExportedTensor(expert=expert, name=name, value=parameter.detach())

    return CheckpointContent(
        state=TrainingState(step=0, data_position=0, term=0, settings=fixed_settings(config)),
        trunk=trunk,
        tokenizer=tokenizer,
        layout=ExpertLayout(trunk.config),
        expert_dtype=getattr(torch, config.model.dtype),
        export=export,
    )

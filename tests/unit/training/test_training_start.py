"""The start of a run: the first checkpoint, and inconsistent settings."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from moecluster.config import Config, read_config
from moecluster.errors import CheckpointError, ConfigError, DataError
from moecluster.models.checkpoint.training_progress import TrainingState, read_training_state, write_training_state
from moecluster.models.native.build import build_model
from moecluster.training.checkpoint_store import CheckpointStore
from moecluster.training.events import Evaluated, Started, StepDone, WentBack
from moecluster.training.history import History
from moecluster.training.plots.loss_curve import draw_loss_curve
from moecluster.training.setup import fixed_settings, prepare_start, read_data, run_tokenizer

TINY = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "expert_inner_size": 16}


def make_config(output_dir: Path, *, model: dict[str, Any] | None = None, **train: Any) -> Config:
    train = {"output_dir": str(output_dir), "sequence_length": 16, "batch_size": 4, "seed": 5} | train
    return read_config({"model": TINY | (model or {}), "train": train})


@pytest.mark.parametrize("model", [{}, {"gate": "sparsely-gated", "tie_embeddings": True, "num_shared_experts": 1}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_checkpoint_is_the_whole_model(tmp_path, model, dtype):
    """Written without ever holding the whole model in memory, it equals a model built at once."""
    config = make_config(tmp_path, model={**model, "dtype": dtype})
    start = prepare_start(config)
    expected = build_model(config.model, config.train.seed).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(start, dtype="auto").state_dict()
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype, name
    assert AutoTokenizer.from_pretrained(start).encode("hé") == list("hé".encode())
    state = read_training_state(start)
    assert state is not None and (state.step, state.data_position, state.settings) == (0, 0, fixed_settings(config))


def test_checkpoints_are_not_trodden_on(tmp_path):
    config = make_config(tmp_path)
    start = prepare_start(config)
    assert prepare_start(config) == start  # a fresh model, as `moecluster up` writes one before any run
    later = start.with_name("step-00000003")
    shutil.copytree(start, later)
    with pytest.raises(ConfigError, match=r"holds checkpoints up to step 3; set train\.resume = true"):
        prepare_start(config)
    assert prepare_start(make_config(tmp_path, resume=True)) == later


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 6}, r"train\.seed: got 6, but .* was trained with 5"),
        ({"batch_size": 8}, r"train\.batch_size: got 8"),
        ({"model": {"expert_inner_size": 32}}, r"model\.expert_inner_size: got 32"),
    ],
)
def test_a_run_goes_on_with_its_own_settings(tmp_path, changed, message):
    prepare_start(make_config(tmp_path))
    with pytest.raises(ConfigError, match=message):
        prepare_start(make_config(tmp_path, resume=True, **changed))
    assert prepare_start(make_config(tmp_path, resume=True, steps=7, lr=1e-4))  # these may change


def test_a_checkpoint_with_a_setting_that_is_gone_resumes(tmp_path):
    start = prepare_start(make_config(tmp_path))
    state = read_training_state(start)
    assert state is not None
    gone = {"train.deterministic": True, "cluster.max_message_bytes": 2**28, "router.max_inflight_bytes": 2**28}
    write_training_state(start, replace(state, step=3, settings={**state.settings, **gone}))
    assert prepare_start(make_config(tmp_path, resume=True)) == start


def test_settings_of_an_earlier_checkpoint_have_their_names_of_today(tmp_path):
    start = prepare_start(make_config(tmp_path))
    earlier = {"train.max_left_out_share": 0.2, "train.deterministic": True, "train.seed": 5}
    write_training_state(start, TrainingState(step=3, data_position=0, term=1, settings=earlier))
    state = read_training_state(start)
    assert state is not None and state.settings == {"train.max_skipped_share": 0.2, "train.seed": 5}


def test_a_checkpoint_that_training_did_not_write(tmp_path):
    CheckpointStore(tmp_path / "checkpoints").write(3, lambda directory: None)
    with pytest.raises(CheckpointError, match="no training state"):
        prepare_start(make_config(tmp_path, resume=True))


def test_nothing_is_trained_in_float16(tmp_path):
    config = make_config(tmp_path, model={"dtype": "float16"})
    with pytest.raises(ConfigError, match=r'model\.dtype: got "float16", .* expected float32 or bfloat16'):
        read_data(config, run_tokenizer(config))


def test_a_vocabulary_that_is_too_small(tmp_path):
    with pytest.raises(
        ConfigError, match=r"train\.tokenizer: it has 259 token ids, and model\.vocab_size has room for 64"
    ):
        prepare_start(make_config(tmp_path, model={"vocab_size": 64}))


def test_a_model_directory_is_taken_as_it_is(tmp_path):
    family = MixtralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    directory = tmp_path / "model"
    MixtralForCausalLM(family).save_pretrained(directory)
    config = make_config(tmp_path / "run", model={"path": str(directory)})
    with pytest.raises(CheckpointError, match="no tokenizer"):
        prepare_start(config)
    run_tokenizer(make_config(tmp_path)).save_pretrained(directory)
    assert prepare_start(config) == directory
    assert not (tmp_path / "run").exists()


def test_history_goes_on_and_the_last_word_counts(tmp_path):
    def step(number: int, loss: float) -> StepDone:
        return StepDone(
            step=number,
            loss=loss,
            aux_losses={"load_balance": 0.02, "router_z": 0.001},
            learning_rate=1e-3,
            grad_norm=1.0,
            seconds=0.5,
            tokens_per_s=100.0,
            balancedness=0.9,
            attempts=1,
        )

    history = History.open(tmp_path)
    history.add(Started(step=0, steps=4, unigram_bits_per_byte=4.5, bytes_per_token=1.0))
    for event in (step(1, 5.0), step(2, 4.0), WentBack(from_step=2, step=1, reason="lost", seconds=1.0), step(2, 4.1)):
        history.add(event)
    history.add(Evaluated(step=2, bits_per_byte=5.9, domains={"a": 5.0, "b": 6.8}))
    with history.path.open("a") as file:
        file.write('{"event": "StepDone", "step": 3, "lo')  # killed while writing
    again = History.open(tmp_path)
    again.add(step(3, 3.5))
    last = History.open(tmp_path)
    assert {number: done.loss for number, done in last.steps.items()} == {1: 5.0, 2: 4.1, 3: 3.5}
    assert last.started == history.started and last.evaluations == history.evaluations

    draw_loss_curve(last, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    draw_loss_curve(last, tmp_path / "loss.svg")
    drawn = (tmp_path / "loss.svg").read_text()
    assert all(
        f"<!-- {words} -->" in drawn for words in ("unigram entropy, 4.50", "load_balance", "router_z", "training")
    )
    assert "auxiliary losses included" not in drawn


def test_steps_of_an_older_history_are_drawn_as_what_they_are(tmp_path):
    """Their loss includes the auxiliary losses."""
    started = '{"event": "Started", "step": 0, "steps": 4, "unigram_bits_per_byte": 4.5, "bytes_per_token": 1.0}'
    figures = '"learning_rate": 1, "grad_norm": 1, "seconds": 1, "tokens_per_s": 1, "balancedness": 1, "attempts": 1'
    old = f'{{"event": "StepDone", "step": 1, "loss": 5.0, {figures}}}'
    new = f'{{"event": "StepDone", "step": 2, "loss": 4.0, "aux_losses": {{"load_balance": 0.5}}, {figures}}}'
    (tmp_path / "history.jsonl").write_text("\n".join([started, old, new, ""]))
    history = History.open(tmp_path)
    assert history.steps[1].aux_losses is None and history.steps[2].total_loss == 4.5
    draw_loss_curve(history, tmp_path / "loss.svg")
    drawn = (tmp_path / "loss.svg").read_text()
    assert all(f"<!-- {words} -->" in drawn for words in ("training", "training, auxiliary losses included"))


@pytest.mark.parametrize("line", ["nonsense", '{"event": "Unheard"}', '{"event": "Started", "step": 1}'])
def test_a_history_of_something_else(tmp_path, line):
    (tmp_path / "history.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"history\.jsonl, line 1: not a record"):
        History.open(tmp_path)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(DataError, match="train first"):
        draw_loss_curve(History.open(tmp_path), tmp_path / "loss.png")

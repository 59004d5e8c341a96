"""A trial leaves nothing behind, whether it succeeds, fails at its start or fails in its thread."""

import threading
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from moecluster.hf import continuous_batching
from moecluster.hf.continuous_batching import supports_paging
from moecluster.hf.trial import left_as_it_was, without_generation_settings
from tests.support.models.families import make_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def state_of(model: PreTrainedModel) -> list[Any]:
    """Everything of a model that a trial could change."""
    modules = [(name, sorted(vars(module)), module.training) for name, module in model.named_modules()]
    hooks = [len(v) for m in model.modules() for k, v in vars(m).items() if k.endswith("_hooks")]
    assert model.generation_config is not None
    return [
        model.config.to_dict(), model.config._attn_implementation, model.generation_config.to_dict(), modules, hooks,
        sorted(thread.name for thread in threading.enumerate()),
    ]  # fmt: skip


def broken(*_: Any, **__: Any) -> Any:
    raise KeyError("not for this family")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "fails", "works"),
    [
        ("mixtral", None, True),
        ("mixtral", "at its beginning", False),
        ("mixtral", "in its thread", False),
        ("deepseek_v3", None, False),
        ("lfm2_moe", None, False),
    ],
)
def test_a_probe_leaves_nothing_behind(
    family: str, fails: str | None, works: bool, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    model.set_attn_implementation(attention)
    before = state_of(model)
    with torch.no_grad():
        expected = model(IDS).logits
    if fails == "at its beginning":
        monkeypatch.setattr(continuous_batching, "_Failures", broken)
    elif fails == "in its thread":
        monkeypatch.setattr(type(model), "forward", broken)
    assert supports_paging(model) is works
    monkeypatch.undo()
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


def test_what_a_trial_changes_is_changed_back_when_it_fails() -> None:
    model = make_model("mixtral")
    before = state_of(model)
    with pytest.raises(KeyError), left_as_it_was(model):
        model.set_attn_implementation("eager")
        model.train()
        model.config.use_cache = False
        model.generation_config = GenerationConfig(num_beams=3)
        model.register_forward_hook(broken)
        vars(model)["_cached_continuous_batching_manager"] = object()
        raise KeyError
    assert state_of(model) == before


def test_generate_takes_nothing_from_a_model_without_its_settings() -> None:
    model: Any = make_model("mixtral")
    asked = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    bare: Any = without_generation_settings(model)
    plain = bare.generate(IDS, generation_config=GenerationConfig(**asked))
    ended = int(plain[0, 8])
    model.generation_config = GenerationConfig(
        eos_token_id=ended, repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[ended], num_beams=2,
        forced_eos_token_id=3, min_length=3, bad_words_ids=[[ended]], begin_suppress_tokens=[int(plain[0, 6])],
        sequence_bias=[[[ended], -50.0]], cache_implementation="static", top_k=1, stop_strings=["a"], max_time=1e-9,
        exponential_decay_length_penalty=(1, 9.0), use_cache=False,
    )  # fmt: skip
    bare = without_generation_settings(model)
    assert torch.equal(bare.generate(IDS, generation_config=GenerationConfig(**asked)), plain)
    assert bare.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.num_beams == 2

"""An expert actor in training: exactly-once gradients, weights that change at commit, export and reload of state."""

import gc
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moecluster.errors import AttemptAborted, NotHosted, StaleRequest, StateLost
from moecluster.expert import compute
from moecluster.expert.service import ExpertService
from moecluster.models.checkpoint.training_progress import TrainingState, write_training_state
from moecluster.models.checkpoint.training_state import expert_optimizer_file
from moecluster.models.config import read_loadable_config
from moecluster.models.experts.layout import ExpertLayout, join_experts
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import (
    ComputeBatch,
    ComputeResult,
    ExpertId,
    MessageKey,
    MicroBatchTag,
    OptimizerSettings,
    Phase,
    StepTag,
)
from tests.support.expert.batches import assert_same_fields
from tests.support.expert.small_actor import (
    EXPERTS,
    LAYER,
    SGD,
    TAG,
    ask,
    batch_of,
    training,
)


@pytest.fixture
def trainer(checkpoint: Path) -> Iterator[ExpertService]:
    with training(checkpoint) as service:
        yield service


def tagged(phase: Phase, *, micro_batch: int = 0, tag: StepTag = TAG, **given: Any) -> ComputeBatch:
    train = MicroBatchTag(step=tag, micro_batch=micro_batch)
    return batch_of(3, phase=phase, train=train, seed=micro_batch, **given)


def backward_key(micro_batch: int = 0) -> MessageKey:
    return MessageKey(rank=0, micro_batch=micro_batch, layer=LAYER, pass_index=0, rows=3)


def run_forward_and_backward(service: ExpertService, tag: StepTag = TAG) -> ComputeResult:
    ask(service, tagged(Phase.TRAIN_FORWARD, tag=tag))
    return ask(service, tagged(Phase.BACKWARD, tag=tag))


def run_step(service: ExpertService, tag: StepTag, learning_rate: float = 0.1) -> None:
    run_forward_and_backward(service, tag)
    service.reduce(tag, [backward_key()])
    service.prepare(tag, clip_scale=1.0, learning_rate=learning_rate)
    service.commit(tag)


def exported(service: ExpertService, **options: bool) -> dict[tuple[ExpertId, str], torch.Tensor]:
    found = service.export(experts=EXPERTS, with_optimizer=options.get("with_optimizer", False))
    return {(tensor.expert, tensor.name): tensor.value for tensor in found}


def assert_same_tensors(
    got: dict[tuple[ExpertId, str], torch.Tensor], expected: dict[tuple[ExpertId, str], torch.Tensor]
) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_weights_change_at_commit_and_by_the_gradient(trainer: ExpertService, modules: dict[int, nn.Module]) -> None:
    before, forward = exported(trainer), batch_of(5, seed=9)
    rows_before = ask(trainer, forward)

    def unchanged() -> None:
        assert_same_tensors(exported(trainer), before)
        assert_same_fields(ask(trainer, forward), rows_before)

    batch = tagged(Phase.BACKWARD)
    run_forward_and_backward(trainer)
    unchanged()
    square_norm = trainer.reduce(TAG, [backward_key()]).square_norm
    unchanged()
    trainer.prepare(TAG, clip_scale=0.5, learning_rate=0.1)
    unchanged()
    assert (trainer.status().prepared, trainer.status().committed) == (TAG, None)
    trainer.commit(TAG)
    assert (trainer.status().prepared, trainer.status().committed) == (None, TAG)

    _, gradients = compute.backward(modules, batch, compute.train_forward(modules, batch)[1])
    after = exported(trainer)
    for (expert, name), value in before.items():
        gradient = gradients.get(expert.index, {}).get(name, torch.zeros(()))
        torch.testing.assert_close(after[expert, name], value - 0.1 * 0.5 * gradient, atol=1e-6, rtol=0)
    total = sum(float(g.double().square().sum()) for named in gradients.values() for g in named.values())
    assert square_norm == pytest.approx(total, rel=1e-9) and total > 0
    check_changed = ask(trainer, forward).y_ND
    assert check_changed is not None and rows_before.y_ND is not None
    assert not torch.equal(check_changed, rows_before.y_ND)


def test_a_repeated_backward_is_answered_again_and_counted_once(trainer: ExpertService) -> None:
    first = run_forward_and_backward(trainer)
    for _ in range(2):
        assert_same_fields(ask(trainer, tagged(Phase.BACKWARD)), first)
    once = trainer.reduce(TAG, [backward_key()]).square_norm
    trainer.abort(TAG)
    again = replace(TAG, attempt=1)
    run_forward_and_backward(trainer, again)
    assert trainer.reduce(again, [backward_key()]).square_norm == once


def test_gradients_of_micro_batches_add_up_and_reduce_names_what_lacks(trainer: ExpertService) -> None:
    for micro_batch in (0, 1):
        ask(trainer, tagged(Phase.BACKWARD, micro_batch=micro_batch))
    with pytest.raises(AttemptAborted, match="1 unexpected messages"):
        trainer.reduce(TAG, [backward_key(0)])
    with pytest.raises(AttemptAborted, match="1 missing messages"):
        trainer.reduce(TAG, [backward_key(0), backward_key(1), backward_key(2)])
    assert trainer.reduce(TAG, [backward_key(1), backward_key(0)]).square_norm > 0


def test_without_room_for_activations_the_gradients_are_the_same_bits(trainer: ExpertService, checkpoint: Path) -> None:
    with training(checkpoint, activation_budget_bytes=0) as service:
        assert_same_fields(run_forward_and_backward(service), run_forward_and_backward(trainer))
        key = [backward_key()]
        assert service.reduce(TAG, key).square_norm == trainer.reduce(TAG, key).square_norm


def test_kept_activations_go_with_backward_abort_and_commit(
    trainer: ExpertService, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[compute.Activations]] = []
    really_train_forward = compute.train_forward

    def watched(
        experts: dict[int, nn.Module], batch: ComputeBatch, run: compute.RunExpert
    ) -> tuple[ComputeResult, compute.Activations]:
        result, activations = really_train_forward(experts, batch, run)
        made.append(weakref.ref(activations))
        return result, activations

    def living() -> int:
        gc.collect()
        return sum(made_one() is not None for made_one in made)

    monkeypatch.setattr(compute, "train_forward", watched)
    for micro_batch in (0, 1):
        ask(trainer, tagged(Phase.TRAIN_FORWARD, micro_batch=micro_batch))
    ask(trainer, batch_of())  # so that the compute thread holds none by itself
    assert living() == 2
    ask(trainer, tagged(Phase.BACKWARD))
    ask(trainer, batch_of())
    assert living() == 1 and len(made) == 2, "backward took what its forward had kept"
    trainer.abort(TAG)
    assert living() == 0

    again = replace(TAG, attempt=1)
    ask(trainer, tagged(Phase.TRAIN_FORWARD, tag=again, micro_batch=1))
    run_step(trainer, again)
    ask(trainer, batch_of())
    assert living() == 0


def test_an_attempt_that_is_over_is_refused(trainer: ExpertService) -> None:
    run_forward_and_backward(trainer)
    trainer.abort(TAG)
    with pytest.raises(StaleRequest, match="was aborted"):
        ask(trainer, tagged(Phase.BACKWARD))
    with pytest.raises(StaleRequest):
        trainer.reduce(TAG, [backward_key()])
    run_step(trainer, replace(TAG, attempt=1))
    with pytest.raises(StaleRequest, match="step 1 is over"):
        ask(trainer, tagged(Phase.TRAIN_FORWARD))
    assert trainer.status(training_term=7).training_term == 7
    with pytest.raises(StaleRequest, match="training term 1 is superseded by term 7"):
        ask(trainer, tagged(Phase.TRAIN_FORWARD, tag=replace(TAG, step=2)))
    with pytest.raises(StaleRequest, match="training term 6 is superseded"):
        trainer.status(training_term=6)


def test_training_messages_to_another_incarnation_of_the_actor_are_refused(trainer: ExpertService) -> None:
    own = ask(trainer, tagged(Phase.TRAIN_FORWARD, incarnation=trainer.incarnation))
    assert own.y_ND is not None
    with pytest.raises(StaleRequest, match=f"this is incarnation {trainer.incarnation}, not another"):
        ask(trainer, tagged(Phase.BACKWARD, incarnation="another"))


def test_an_actor_that_does_not_train_says_that_the_state_is_lost(service: ExpertService) -> None:
    with pytest.raises(StateLost, match="expert-0 trains nothing"):
        ask(service, tagged(Phase.TRAIN_FORWARD))
    for order in (
        lambda: service.reduce(TAG, []),
        lambda: service.prepare(TAG, clip_scale=1.0, learning_rate=0.1),
        lambda: service.commit(TAG),
        lambda: list(service.export(experts=EXPERTS, with_optimizer=True)),
    ):
        with pytest.raises(StateLost):
            order()
    service.abort(TAG)  # with nothing to abort


def test_experts_that_were_only_served_are_loaded_anew_for_training(
    service: ExpertService, checkpoint: Path, trainer: ExpertService
) -> None:
    loaded = service.load(
        LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), optimizer=SGD, training_term=1)
    )
    assert loaded == service.status().hosted_bytes
    assert_same_fields(run_forward_and_backward(service), run_forward_and_backward(trainer))


# -- export and reload of state --


def test_export_gives_the_checkpoint_s_weights(service: ExpertService, modules: dict[int, nn.Module]) -> None:
    tensors = exported(service)
    expected = {
        (ExpertId(layer=LAYER, index=index), name): parameter.detach()
        for index, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    assert_same_tensors(tensors, expected)
    with pytest.raises(NotHosted, match="expert 5/5 is not here"):
        list(service.export(experts=[ExpertId(layer=5, index=5)], with_optimizer=False))


def test_only_the_committed_step_is_exported(trainer: ExpertService) -> None:
    run_step(trainer, TAG)
    assert len(list(trainer.export(experts=EXPERTS[:1], with_optimizer=False, step=1))) > 0
    for step in (2, 7):
        with pytest.raises(StaleRequest, match=f"step {step} is not what is committed here"):
            list(trainer.export(experts=EXPERTS[:1], with_optimizer=False, step=step))


def write_checkpoint(source: Path, target: Path, tensors: dict[tuple[ExpertId, str], torch.Tensor], step: int) -> None:
    """Writes the source's trunk with exported experts and their optimizer state."""
    shutil.copytree(source, target)
    layout = ExpertLayout(read_loadable_config(source))
    own = {e: {name: v for (owner, name), v in tensors.items() if owner == e and "/" not in name} for e in EXPERTS}
    weights = load_file(target / "model.safetensors")
    weights |= join_experts([layout.checkpoint_state(expert, own[expert]) for expert in EXPERTS])
    save_file(weights, target / "model.safetensors")
    write_training_state(target, TrainingState(step=step, data_position=0, term=1, settings={}))
    optimizer = {
        f"{owner.index}/{name.removeprefix('optimizer/')}": value
        for (owner, name), value in tensors.items()
        if name.startswith("optimizer/")
    }
    save_file(optimizer, expert_optimizer_file(target, LAYER))


def test_training_goes_on_from_what_was_exported_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    adamw = OptimizerSettings(weight_decay=0.1)
    with training(checkpoint, optimizer=adamw) as original:
        run_step(original, TAG, learning_rate=1e-2)
        state = exported(original, with_optimizer=True)
        kinds = {name.split("/")[1] for _, name in state if name.startswith("optimizer/")}
        assert kinds == {"exp_avg", "exp_avg_sq", "step"}
        write_checkpoint(checkpoint, tmp_path / "saved", state, step=1)
        second = StepTag(term=2, step=2, attempt=0)
        run_step(original, second, learning_rate=1e-2)
        undisturbed = exported(original, with_optimizer=True)

    with training(tmp_path / "saved", "expert-1", adamw, term=2) as successor:
        assert_same_tensors(exported(successor, with_optimizer=True), state)
        with pytest.raises(StaleRequest, match="step 1 is over"):
            run_forward_and_backward(successor, replace(second, step=1))
        with pytest.raises(StateLost, match="holds step 1 and was asked for step 3"):
            run_forward_and_backward(successor, replace(second, step=3))
        run_step(successor, second, learning_rate=1e-2)
        assert_same_tensors(exported(successor, with_optimizer=True), undisturbed)
    assert not all(torch.equal(undisturbed[key], value) for key, value in state.items())

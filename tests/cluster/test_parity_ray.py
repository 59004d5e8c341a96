"""A model with its experts in Ray actors equals the whole model in one process, for one family of each layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.models.experts.source import ExpertSource
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.rpc.expert.interface import ExpertControl
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import ExpertId, OptimizerSettings, StepTag
from tests.support.clusters.ray_cluster import RayCluster
from tests.support.clusters.ray_session import RaySession
from tests.support.models.families import Layout, make_model, save
from tests.support.models.parity import (
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    NEW_TOKENS,
    Outcome,
    assert_same_outcome,
    batch_for,
    expert_gradients,
    largest_difference,
    load_routed,
    run_model,
)

Weights = dict[ExpertId, dict[str, torch.Tensor]]
CHECKPOINTS: list[tuple[str, Layout]] = [("mixtral", "per-expert"), ("gpt_oss", "fused")]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One family: the whole model in this process, and its experts in a cluster."""

    family: str
    layout: Layout
    directory: Path
    model: PreTrainedModel
    reference: Outcome
    cluster: RayCluster
    remote: RemoteExperts


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=[family for family, _ in CHECKPOINTS])
def case(
    request: pytest.FixtureRequest, ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    family, layout = request.param
    directory = tmp_path_factory.mktemp(family)
    model = make_model(family)
    save(model, directory, layout)
    build_byte_tokenizer().save_pretrained(directory)
    actors = {"cluster": {"num_expert_actors": 2}}
    with RayCluster(directory, actors) as cluster, cluster.remote_experts(hold=True) as remote:
        yield Case(
            family=family,
            layout=layout,
            directory=directory,
            model=model,
            reference=run_model(model),
            cluster=cluster,
            remote=remote,
        )


def train_with_sgd(case: Case, directory: Path, term: int) -> dict[str, ExpertControl]:
    """Reloads the experts for training by plain gradient descent; returns their actors' controls."""
    case.cluster.driver.give_directory(str(directory))
    placement, controls = case.remote.pool.placement(), case.remote.pool.controls()
    for actor, control in controls.items():
        control.load(
            LoadRequest(
                term=placement.term,
                experts=placement.experts_on(actor),
                checkpoint=str(directory),
                optimizer=OptimizerSettings(name="sgd"),
                replace=True,
                training_term=term,
            )
        )
    return controls


def exported(case: Case, controls: dict[str, ExpertControl]) -> Weights:
    """Every expert's parameters, as its actor exports them."""
    placement, weights = case.remote.pool.placement(), Weights()
    for actor, control in controls.items():
        for tensor in control.export(experts=placement.experts_on(actor), with_optimizer=False):
            weights.setdefault(tensor.expert, {})[tensor.name] = tensor.value
    return weights


def commit(remote: RemoteExperts, controls: dict[str, ExpertControl], tag: StepTag) -> None:
    """A step of gradient descent with learning rate 1: subtracts the gradients from the parameters."""
    sent = remote.sent(tag)
    for actor, control in controls.items():
        control.reduce(tag, sent.get(actor, []))
    for control in controls.values():
        control.prepare(tag, clip_scale=1.0, learning_rate=1.0)
    for control in controls.values():
        control.commit(tag)
    remote.forget(tag)


def test_the_router_actor_writes_what_the_whole_model_writes(case: Case) -> None:
    ids = batch_for()[0, :5]
    with case.cluster.client() as client:
        stream = client.generate(bytes(ids.tolist()).decode(), max_new_tokens=NEW_TOKENS)
        stream.text()
    whole = case.model.generate(ids[None], max_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]
    assert stream.prompt_tokens == 5
    assert stream.ids == whole[0, 5:].tolist()


def test_logits_gradients_and_greedy_tokens_equal_one_process(case: Case) -> None:
    """After this test the actors hold trained experts."""
    controls = train_with_sgd(case, case.directory, term=1)
    before = exported(case, controls)
    tag = StepTag(term=1, step=1, attempt=0)

    with case.remote.training(tag):
        ours = run_model(load_routed(case.directory, case.remote))

    assert_same_outcome(ours, case.reference)
    commit(case.remote, controls, tag)
    after = exported(case, controls)
    compared = 0
    for layer in ExpertSource(case.directory).layers:
        for index in range(layer.num_experts):
            expert = ExpertId(layer=layer.layer, index=index)
            for name, gradient in expert_gradients(case.model, layer.name, index).items():
                descent = before[expert][name] - after[expert][name]
                assert largest_difference(descent, gradient) <= GRADIENT_TOLERANCE, f"{expert} {name}"
                compared += bool(gradient.abs().max() > 100 * GRADIENT_TOLERANCE)
    assert compared >= 8  # of 8 experts in 2 layers, most were trained by more than the tolerance


def test_one_expert_perturbed_by_a_hundredth_is_noticed(case: Case, tmp_path: Path) -> None:
    """Negative control: the actors load a slightly wrong expert."""
    layer = ExpertSource(case.directory).layers[0]
    used = [sum(g.abs().sum() for g in expert_gradients(case.model, layer.name, i).values()) for i in range(4)]
    perturbed = make_model(case.family)
    with torch.no_grad():
        for _, parameter in perturbed.get_submodule(layer.name).named_parameters(recurse=False):
            parameter[used.index(max(used))] *= 1.01
    save(perturbed, tmp_path, case.layout)
    train_with_sgd(case, tmp_path, term=2)

    with case.remote.training(StepTag(term=2, step=1, attempt=0)):
        ours = run_model(load_routed(case.directory, case.remote))

    assert largest_difference(ours.logits, case.reference.logits) > LOGIT_TOLERANCE
    with pytest.raises(AssertionError):
        assert_same_outcome(ours, case.reference)

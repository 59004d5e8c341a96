"""Training over expert services in this process, against a plain torch loop in one process, and against itself."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moecluster.config import Config
from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import AttemptAborted, StateLost, Unavailable
from moecluster.expert.service import ExpertService
from moecluster.models.trunk import load_trunk
from moecluster.rpc.controller.in_process import FixedPlacement
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.training.events import AttemptFailed, Event, StepDone, WentBack
from moecluster.training.loop import TrainingLoop
from moecluster.training.setup import prepare_start, read_data, run_tokenizer
from moecluster.types import ActorAddress, ComputeBatch, Phase, Placement, PlacementNumber
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.clusters.given import any_directory
from tests.support.training.training_runs import (
    assert_equal_within,
    losses,
    losses_in_one_process,
    make_config,
    write_text,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def run_in_cluster(
    config: Config, *, until: int = 10**9, cluster: Callable[[Path], ExpertCluster] | None = None
) -> list[Event]:
    """Runs training over four services up to a step; returns its events."""
    start = prepare_start(config)
    tokenizer = run_tokenizer(config)
    events: list[Event] = []
    with cluster(start) if cluster is not None else ExpertCluster(start, num_actors=4) as services:
        loop = TrainingLoop(
            config, services.remote, start=start, data=read_data(config, tokenizer), tokenizer=tokenizer
        )
        for event in loop.run():
            events.append(event)
            if isinstance(event, StepDone) and event.step == until:
                break
        loop.close()
    return events


def test_fifty_steps_equal_one_process(text, tmp_path):
    config = make_config(text, tmp_path, steps=50, checkpoint_every_steps=0)
    expected = losses_in_one_process(config)
    assert_equal_within(losses(run_in_cluster(config)), expected, 1e-5)
    assert expected[50] < 0.5 * expected[1]  # it learns, with decay, clipping and warm-up


@pytest.mark.parametrize(
    ("gate", "top_k", "options"),
    [
        ("switch", 1, {"jitter": 0.1, "capacity_factor": 1.0}),
        ("sparsely-gated", 2, {}),
        ("deepseek-v3", 2, {"n_group": 2, "topk_group": 2, "bias_update_speed": 0.05}),
    ],
)
def test_gates_with_noise_and_state_equal_one_process(text, tmp_path, gate, top_k, options):
    model = {"gate": gate, "gate_options": options, "top_k": top_k}
    config = make_config(text, tmp_path, model=model, steps=12, checkpoint_every_steps=0)
    assert_equal_within(losses(run_in_cluster(config)), losses_in_one_process(config), 1e-5)


def test_a_perturbed_expert_is_noticed(text, tmp_path):
    """Negative control: the parity check detects one expert that is 1 % off."""
    config = make_config(text, tmp_path, steps=10, checkpoint_every_steps=0)

    def perturbed(start: Path) -> ExpertCluster:
        file = start / "model-layer-000-experts.safetensors"
        tensors = load_file(file)
        tensors["model.layers.0.mlp.experts.0.down_proj.weight"] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})
        return ExpertCluster(start, num_actors=4)

    with pytest.raises(AssertionError):
        assert_equal_within(losses(run_in_cluster(config, cluster=perturbed)), losses_in_one_process(config), 1e-5)


def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(text, tmp_path):
    straight = losses(run_in_cluster(make_config(text, tmp_path / "straight")))
    config = make_config(text, tmp_path / "ended")
    first = losses(run_in_cluster(config, until=5))
    second = losses(run_in_cluster(make_config(text, tmp_path / "ended", resume=True)))
    assert sorted(second) == [5, 6]  # from the checkpoint of step 4 on
    assert {**first, **second} == straight


class RestartingCluster(ExpertCluster):
    """Services that can be killed; a simple controller restarts them, untrained, from the first checkpoint."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, num_actors=4)
        self._directory = directory
        self.changing = ChangingPlacement(self.placement)
        self.pool = ExpertPool(self.changing, connect=self.connect, control=self.control)
        self.remote = RemoteExperts(self.pool, timeout_s=5.0)
        self.dead: list[ExpertService] = []

    def kill(self, name: str) -> None:
        old = self.services[name]
        self.dead.append(old)
        service = self.services[name] = ExpertService(is_given=any_directory, name=name)
        service.load(LoadRequest(term=1, experts=self.placement.experts_on(name), checkpoint=str(self._directory)))
        address = ActorAddress(actor=name, address="", incarnation=service.incarnation)
        self.placement = replace(
            self.placement,
            generation=self.placement.generation + 1,
            actors={**self.placement.actors, name: address},
        )
        self.changing.publish(self.placement)

    def close(self) -> None:
        super().close()
        for service in self.dead:
            service.close()


class ChangingPlacement(FixedPlacement):
    def publish(self, placement: Placement) -> None:
        self._placement = placement

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        return self._placement if self._placement.number > number else super().newer_than(number, timeout_s)


def make_mortal(cluster: RestartingCluster, name: str, point: str, at: int, *, after: bool) -> None:
    """Kills the service at its call number `at` of a kind: before it does anything, or before it replies."""
    service = cluster.services[name]
    calls = 0

    def answer(kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if service in cluster.dead:
            raise Unavailable(f"{name} is dead")
        calls += kind == point
        if kind != point or calls != at:
            return call(*args, **kwargs)
        if after and kind not in ("train_forward", "backward"):
            call(*args, **kwargs)
        cluster.kill(name)
        raise Unavailable(f"{name} died")

    def mortal_submit(batch: ComputeBatch, reply: Callable[[Any], None], submit: Any = service.submit) -> None:
        kind = {Phase.TRAIN_FORWARD: "train_forward", Phase.BACKWARD: "backward"}.get(batch.phase, "forward")
        answer(kind, submit, batch, reply)

    service.submit = mortal_submit  # type: ignore[method-assign,assignment]
    for order in ("reduce", "prepare", "commit", "abort", "status", "export"):
        setattr(service, order, partial(answer, order, getattr(service, order)))


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    return losses(run_in_cluster(make_config(text, tmp_path_factory.mktemp("undisturbed"))))


@pytest.mark.parametrize(
    ("point", "at", "after"),
    [
        ("train_forward", 15, False),
        ("backward", 15, False),
        ("reduce", 4, False),
        ("reduce", 4, True),
        ("prepare", 4, False),
        ("prepare", 4, True),
        ("commit", 1, True),
        ("commit", 4, False),
        ("commit", 4, True),
        ("export", 2, False),
    ],
)
def test_an_actor_that_dies_does_not_change_the_curve(text, tmp_path, undisturbed, point, at, after):
    def mortal(start: Path) -> ExpertCluster:
        cluster = RestartingCluster(start)
        make_mortal(cluster, "expert-2", point, at, after=after)
        return cluster

    events = run_in_cluster(make_config(text, tmp_path), cluster=mortal)
    assert len([event for event in events if isinstance(event, WentBack)]) == 1
    assert losses(events) == undisturbed


def test_without_durability_lost_state_ends_the_run(text, tmp_path):
    def mortal(start: Path) -> ExpertCluster:
        cluster = RestartingCluster(start)
        make_mortal(cluster, "expert-2", "reduce", 3, after=False)
        return cluster

    with pytest.raises(StateLost):
        run_in_cluster(make_config(text, tmp_path, durability="none"), cluster=mortal)


def test_an_attempt_that_fails_is_run_again(text, tmp_path, undisturbed):
    """A reply is late while all actors live: no state is lost, and nothing counts twice."""

    def forgetful(start: Path) -> ExpertCluster:
        cluster = ExpertCluster(start, num_actors=4)
        service = cluster.services["expert-1"]
        reduce, calls = service.reduce, 0

        def late(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise AttemptAborted("a message is missing")
            return reduce(*args)

        service.reduce = late  # type: ignore[method-assign, assignment]
        return cluster

    events = run_in_cluster(make_config(text, tmp_path), cluster=forgetful)
    assert [(e.step, e.attempt) for e in events if isinstance(e, AttemptFailed)] == [(3, 0)]
    assert not any(isinstance(event, WentBack) for event in events)
    assert losses(events) == undisturbed


def test_the_last_checkpoint_is_an_ordinary_model(text, tmp_path):
    """from_pretrained gives the model that the cluster trained: its loss on the next batch is the same."""
    config = make_config(text, tmp_path, steps=4)
    run_in_cluster(config)
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = read_data(config, AutoTokenizer.from_pretrained(checkpoint)).train_batch(16, 4)
    with ExpertCluster(checkpoint, num_actors=3) as cluster, torch.no_grad():
        expected = load_trunk(checkpoint, cluster.remote)(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(model.eval()(input_ids=ids, labels=ids).loss, expected, rtol=0, atol=1e-6)

"""The step protocol over real StepStates, with lost requests and replies, and killed participants and coordinators.

The final parameters must always equal those of an undisturbed run, bit for bit.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from moecluster.errors import AttemptAborted, MoeClusterError, StaleRequest, StateLost, UserError
from moecluster.training.coordinator import Recovered, StepCoordinator, clip_scale_of
from moecluster.types import StepTag
from tests.support.training.faulty_steps import (
    EXPECTED,
    FAULTS,
    MAX_GRAD_NORM,
    NAMES,
    ORDERS,
    STEPS,
    CoordinatorDied,
    Job,
    message,
)


@pytest.fixture(scope="module")
def undisturbed():
    return Job().run()


def check(faults: dict[str, dict[tuple[str, int], str]], undisturbed: dict[str, torch.Tensor]) -> None:
    ended = Job(faults).run()
    for name, weight in undisturbed.items():
        assert torch.equal(ended[name], weight), name


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("order", ["accumulate", "reduce", "prepare", "commit", "status"])
@pytest.mark.parametrize("name", NAMES[:2])
def test_one_fault_at_every_kind_of_order(undisturbed, name, order, fault):
    for count in range(4):
        check({name: {(order, count): fault}}, undisturbed)


PLACES = st.tuples(st.sampled_from(NAMES), st.sampled_from(ORDERS), st.integers(0, 9))


@given(faults=st.dictionaries(PLACES, st.sampled_from(FAULTS), max_size=6))
@settings(max_examples=300)
@example(faults={("expert-0", "commit", 0): "coordinator dies after", ("expert-1", "commit", 0): "killed before"})
@example(
    faults={("trunk", "commit", 1): "coordinator dies before", ("expert-0", "commit", 1): "coordinator dies after"}
)
@example(faults={("expert-1", "status", 2): "killed after", ("expert-1", "commit", 2): "coordinator dies before"})
def test_any_faults(undisturbed, faults):
    by_member: dict[str, dict[tuple[str, int], str]] = {}
    for (name, order, count), fault in faults.items():
        by_member.setdefault(name, {})[order, count] = fault
    check(by_member, undisturbed)


def test_the_undisturbed_run_needs_no_replay_and_is_torch_optim():
    job = Job()
    starts = {name: weight.clone() for name, (weight, _, _) in job.checkpoint.items()}
    ended = job.run()
    assert job.replays == STEPS
    parameters = {name: nn.Parameter(weight) for name, weight in starts.items()}
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, STEPS + 1):
        for i, parameter in enumerate(parameters.values()):
            targets = [
                torch.randn(3, 2, generator=torch.Generator().manual_seed(100 * step + 10 * m + i)) for m in range(2)
            ]
            parameter.grad = (parameter.detach() - targets[0]) + (parameter.detach() - targets[1])
        torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
        optimizer.param_groups[0]["lr"] = 0.1 / step
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(ended[name], parameter.detach(), rtol=0, atol=1e-6)


def started_job() -> tuple[Job, StepTag]:
    """A job whose members hold the gradients of step 1."""
    job = Job()
    tag = StepTag(term=job.term, step=1, attempt=0)
    for micro_batch in range(2):
        for member in job.members.values():
            member.backward(tag, micro_batch)
    return job, tag


def successor_of(job: Job) -> StepCoordinator:
    return StepCoordinator(job.members, term=job.term + 1, repeat_s=0.5, pause_s=0.0)


def prepare_at(job: Job, tag: StepTag, names: Sequence[str]) -> None:
    for name in NAMES:
        job.members[name].reduce(tag, EXPECTED[name])
    for name in names:
        job.members[name].prepare(tag, clip_scale=1.0, learning_rate=0.1)


def test_a_successor_commits_what_all_have_prepared():
    job, tag = started_job()
    prepare_at(job, tag, NAMES)
    assert successor_of(job).recover() == Recovered(step=1, next_attempt=1)
    assert [member.state.committed for member in job.members.values()] == [tag] * 3


def test_a_successor_commits_what_one_has_committed():
    job, tag = started_job()
    prepare_at(job, tag, NAMES)
    job.members["trunk"].commit(tag)
    assert successor_of(job).recover() == Recovered(step=1, next_attempt=1)
    assert [member.state.committed for member in job.members.values()] == [tag] * 3


def test_a_successor_aborts_what_only_some_have_prepared():
    job, tag = started_job()
    prepare_at(job, tag, NAMES[:2])
    assert successor_of(job).recover() == Recovered(step=None, next_attempt=1)
    assert [member.state.prepared for member in job.members.values()] == [None] * 3
    with pytest.raises(StaleRequest):
        job.members["trunk"].state.prepare(tag, clip_scale=1.0, learning_rate=0.1)


def test_another_incarnation_of_a_participant_is_not_the_same():
    """Even if it was reloaded and holds the same state as the old one."""
    job, tag = started_job()
    job.members["expert-0"].restarts += 1
    with pytest.raises(StateLost, match="expert-0#1 instead of expert-0#0"):
        job.coordinator.step(tag, EXPECTED, learning_rate=0.1)


def test_messages_that_do_not_match_abort():
    job, tag = started_job()
    with pytest.raises(AttemptAborted, match="missing"):
        job.coordinator.step(tag, {**EXPECTED, "trunk": [message(0), message(1), message(2)]}, learning_rate=0.1)
    with pytest.raises(AttemptAborted, match="expert-9 got gradients and take no part"):
        job.coordinator.step(tag, {**EXPECTED, "expert-9": [message(0)]}, learning_rate=0.1)


def test_gradients_that_are_not_finite_are_the_users_to_mend():
    job = Job()
    tag = StepTag(term=job.term, step=1, attempt=0)
    grads = {"m": {"w": torch.full((3, 2), float("nan"))}}
    job.members["trunk"].state.accumulate(tag, message(0), grads)
    with pytest.raises(UserError, match="step 1: the gradient norm is nan"):
        job.coordinator.step(tag, {"trunk": [message(0)]}, learning_rate=0.1)


def test_a_coordinator_of_an_older_term_learns_that_it_is_deposed():
    job, tag = started_job()
    successor = StepCoordinator(job.members, term=job.term + 1)
    successor.recover()
    for order in (lambda: job.coordinator.step(tag, EXPECTED, learning_rate=0.1), job.coordinator.verify):
        with pytest.raises(StaleRequest, match="is superseded by term"):
            order()
    job.coordinator.abort(tag)  # reaches nobody, and raises nothing
    successor.verify()


def test_a_participant_that_stays_silent_ends_the_attempt():
    job, tag = started_job()
    job.members["expert-1"].faults.update({("reduce", i): "request lost" for i in range(10**5)})
    with pytest.raises(AttemptAborted, match="expert-1 did not answer Reduce"):
        job.coordinator.step(tag, EXPECTED, learning_rate=0.1)


@pytest.mark.parametrize(
    ("grad_norm", "max_grad_norm", "expected"), [(2.0, 1.0, 0.5), (0.5, 1.0, 1.0), (100.0, 0.0, 1.0)]
)
def test_clip_scale(grad_norm, max_grad_norm, expected):
    assert clip_scale_of(grad_norm, max_grad_norm) == pytest.approx(expected, rel=1e-6)


def test_errors_are_ours():
    assert not issubclass(CoordinatorDied, MoeClusterError)

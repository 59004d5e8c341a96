"""One participant of a training step: fences, exactly-once accumulation, and the order of sums."""

import itertools
import threading

import pytest
import torch
from torch import nn

from moecluster.errors import AttemptAborted, InvalidMessage, StaleRequest, StateLost
from moecluster.optim.step_state import StepState
from moecluster.types import MessageKey, OptimizerSettings, StepTag

SGD = OptimizerSettings(name="sgd")


def tag(step: int = 1, attempt: int = 0, term: int = 1) -> StepTag:
    return StepTag(term=term, step=step, attempt=attempt)


def key(rank: int = 0, micro_batch: int = 0, rows: int = 4, pass_index: int = 0) -> MessageKey:
    return MessageKey(rank=rank, micro_batch=micro_batch, layer=0, pass_index=pass_index, rows=rows)


def make_state(
    values: dict[str, float] | None = None, *, ranks: int = 1, settings: OptimizerSettings = SGD
) -> tuple[StepState, dict[str, nn.Parameter]]:
    """A state over modules with one scalar-like parameter w each."""
    parameters = {m: nn.Parameter(torch.tensor([v])) for m, v in (values or {"0/0": 1.0}).items()}
    state = StepState(settings, ranks=ranks)
    for module, parameter in parameters.items():
        state.add(module, {"w": parameter})
    return state, parameters


def grads(value: float, module: str = "0/0") -> dict[str, dict[str, torch.Tensor]]:
    return {module: {"w": torch.tensor([value])}}


def run_step(state: StepState, at: StepTag, value: float = 1.0, lr: float = 0.5) -> None:
    state.accumulate(at, key(), grads(value))
    state.reduce(at, [key()])
    state.prepare(at, clip_scale=1.0, learning_rate=lr)
    state.commit(at)


def test_a_step():
    state, parameters = make_state()
    assert state.accumulate(tag(), key(), grads(3.0))
    assert state.reduce(tag(), [key()]) == 9.0
    state.prepare(tag(), clip_scale=0.5, learning_rate=0.1)
    assert (state.prepared, state.committed) == (tag(), None)
    assert parameters["0/0"].item() == 1.0
    state.commit(tag())
    assert (state.prepared, state.committed) == (None, tag())
    assert parameters["0/0"].item() == pytest.approx(1.0 - 0.1 * 0.5 * 3.0)


def test_everything_may_be_repeated_and_counts_once():
    state, parameters = make_state()
    assert state.accumulate(tag(), key(), grads(3.0))
    assert not state.accumulate(tag(), key(), grads(3.0))
    for _ in range(2):
        assert state.reduce(tag(), [key()]) == 9.0
    assert not state.accumulate(tag(), key(), grads(3.0))
    for _ in range(2):
        state.prepare(tag(), clip_scale=1.0, learning_rate=0.1)
    assert state.reduce(tag(), [key()]) == 9.0
    for _ in range(2):
        state.commit(tag())
    assert parameters["0/0"].item() == pytest.approx(0.7)


def test_reduce_names_what_lacks_and_what_is_too_much():
    state, _ = make_state()
    state.accumulate(tag(), key(), grads(1.0))
    with pytest.raises(AttemptAborted, match=r"1 missing messages.*micro_batch=1"):
        state.reduce(tag(), [key(), key(micro_batch=1)])
    with pytest.raises(AttemptAborted, match="1 unexpected messages"):
        state.reduce(tag(), [])
    with pytest.raises(AttemptAborted, match=r"1 missing.*rows=5.*1 unexpected.*rows=4"):
        state.reduce(tag(), [key(rows=5)])


def test_a_message_after_reduce_aborts():
    state, _ = make_state()
    state.accumulate(tag(), key(), grads(1.0))
    state.reduce(tag(), [key()])
    with pytest.raises(AttemptAborted, match="after the gradients"):
        state.accumulate(tag(), key(micro_batch=1), grads(1.0))


def test_a_newer_attempt_drops_gradients_and_prepared_state():
    state, parameters = make_state()
    state.accumulate(tag(), key(), grads(100.0))
    state.reduce(tag(), [key()])
    state.prepare(tag(), clip_scale=1.0, learning_rate=1.0)
    state.admit(tag(attempt=1))
    assert state.prepared is None
    with pytest.raises(StaleRequest):
        state.commit(tag())
    with pytest.raises(StaleRequest):
        state.accumulate(tag(), key(), grads(1.0))
    run_step(state, tag(attempt=1), value=1.0)
    assert parameters["0/0"].item() == 0.5


def test_an_aborted_attempt_stays_aborted():
    state, parameters = make_state()
    state.accumulate(tag(), key(), grads(100.0))
    state.abort(tag())
    state.abort(tag())
    with pytest.raises(StaleRequest, match="aborted"):
        state.accumulate(tag(), key(), grads(100.0))
    run_step(state, tag(attempt=1))
    assert parameters["0/0"].item() == 0.5
    with pytest.raises(StaleRequest, match="committed"):
        state.abort(tag(attempt=1))


def test_commit_needs_prepare():
    state, _ = make_state()
    with pytest.raises(StaleRequest, match="nothing"):
        state.commit(tag())
    state.accumulate(tag(), key(), grads(1.0))
    with pytest.raises(AttemptAborted, match="not reduced"):
        state.prepare(tag(), clip_scale=1.0, learning_rate=1.0)


def test_commit_names_the_attempt():
    state, parameters = make_state()
    state.accumulate(tag(attempt=1), key(), grads(1.0))
    state.reduce(tag(attempt=1), [key()])
    state.prepare(tag(attempt=1), clip_scale=1.0, learning_rate=0.5)
    for other in (tag(attempt=0), tag(step=2, attempt=1)):
        with pytest.raises(StaleRequest, match="is not prepared here"):
            state.commit(other)
    assert parameters["0/0"].item() == 1.0


def test_a_higher_term_fences_and_commits_what_the_old_one_prepared():
    state, parameters = make_state()
    state.accumulate(tag(), key(), grads(1.0))
    state.reduce(tag(), [key()])
    state.prepare(tag(), clip_scale=1.0, learning_rate=0.5)
    state.fence(2)
    for order in (state.commit, state.abort, state.admit):
        with pytest.raises(StaleRequest, match="term 1"):
            order(tag())
    assert state.prepared == tag()  # fencing alone loses nothing
    state.commit(tag(term=2))
    assert parameters["0/0"].item() == 0.5
    assert state.committed == tag()  # as prepared
    state.commit(tag(term=3))  # a second successor, repeating


def test_steps_are_taken_one_by_one():
    state, _ = make_state()
    state.reset(term=1, step=7)
    with pytest.raises(StaleRequest, match="7 is committed"):
        state.admit(tag(step=7))
    with pytest.raises(StateLost, match="holds step 7"):
        state.admit(tag(step=9))
    run_step(state, tag(step=8))
    with pytest.raises(StateLost):
        state.admit(tag(step=10))
    state.reset(term=2, step=3)
    assert state.committed is None
    run_step(state, tag(step=4, term=2))


def test_going_back_needs_no_lower_term():
    state, _ = make_state()
    state.fence(5)
    with pytest.raises(StaleRequest):
        state.reset(term=4, step=0)


@pytest.mark.parametrize("turns_of_rank_0", list(itertools.combinations(range(6), 3)))
def test_sums_do_not_depend_on_the_order_of_arrival(turns_of_rank_0):
    """Two ranks send three micro-batches each, in order but interleaved arbitrarily."""
    values = {(0, 0): 1e8, (0, 1): 1.0, (1, 0): -1e8, (1, 1): 3.0, (2, 0): 1e-3, (2, 1): 7.0}  # (micro-batch, rank)
    expected = torch.zeros(1)
    for place in sorted(values):
        expected = expected + torch.tensor([values[place]])  # any other order rounds otherwise

    state, parameters = make_state({"0/0": 0.0}, ranks=2)
    sent = [0, 0]
    for turn in range(6):
        rank = 0 if turn in turns_of_rank_0 else 1
        state.accumulate(tag(), key(rank=rank, micro_batch=sent[rank]), grads(values[sent[rank], rank]))
        sent[rank] += 1
    state.reduce(tag(), [key(rank=r, micro_batch=m) for m, r in values])
    state.prepare(tag(), clip_scale=1.0, learning_rate=1.0)
    state.commit(tag())
    assert torch.equal(-parameters["0/0"].detach(), expected)


def test_a_micro_batch_out_of_turn_aborts():
    state, _ = make_state()
    state.accumulate(tag(), key(micro_batch=1), grads(1.0))
    with pytest.raises(AttemptAborted, match="micro-batch 0 after 1"):
        state.accumulate(tag(), key(micro_batch=0), grads(1.0))


def test_unknown_ranks_and_modules_are_refused():
    state, _ = make_state()
    with pytest.raises(InvalidMessage, match="rank: got 1"):
        state.accumulate(tag(), key(rank=1), grads(1.0))
    with pytest.raises(AttemptAborted, match="5/5"):
        state.accumulate(tag(), key(), grads(1.0, module="5/5"))


def test_modules_without_tokens():
    """One stays unchanged, as in torch.optim without a gradient; one of a fused family decays, as with a zero
    gradient."""
    settings = OptimizerSettings(name="adamw", weight_decay=0.1)
    parameters = {m: nn.Parameter(torch.ones(2, 2)) for m in ("0/0", "0/1", "0/2")}
    state = StepState(settings)
    for module, parameter in parameters.items():
        state.add(module, {"w": parameter}, zero_when_absent=module == "0/2")
    state.accumulate(tag(), key(), {"0/0": {"w": torch.ones(2, 2)}})
    state.reduce(tag(), [key()])
    state.prepare(tag(), clip_scale=1.0, learning_rate=0.1)
    state.commit(tag())
    assert torch.equal(parameters["0/1"], torch.ones(2, 2)) and state.state_tensors("0/1") == {}
    fused = nn.Parameter(torch.ones(2, 2))
    fused.grad = torch.zeros(2, 2)
    torch.optim.AdamW([fused], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1).step()
    assert torch.equal(parameters["0/2"], fused)
    assert set(state.state_tensors("0/2")) == {"exp_avg/w", "exp_avg_sq/w", "step/w"}


def test_a_removed_module_takes_no_part():
    state, _ = make_state({"0/0": 1.0, "0/1": 1.0})
    state.remove("0/1")
    state.remove("0/1")
    assert state.modules == ("0/0",)
    run_step(state, tag())


def test_many_threads_send_one_message_each_twice():
    """The same messages from many threads at once: each counts once."""
    state, parameters = make_state({"0/0": 0.0}, ranks=8)
    fresh: list[bool] = []
    threads = [
        threading.Thread(target=lambda r=r: fresh.append(state.accumulate(tag(), key(rank=r), grads(1.0))))
        for r in [*range(8), *range(8)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fresh) == [False] * 8 + [True] * 8
    assert state.reduce(tag(), [key(rank=r) for r in range(8)]) == 64.0
    state.prepare(tag(), clip_scale=1.0, learning_rate=1.0)
    state.commit(tag())
    assert parameters["0/0"].item() == -8.0

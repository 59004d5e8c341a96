"""A failure in an engine ends only the sequences concerned. With continuous and with static batching."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import BatchBroken, MoeClusterError, RequestFailed, Unavailable
from moecluster.router.engine import continuous_batching, static_batching
from moecluster.router.engine import sampler as token_choice
from moecluster.router.engine.continuous_batching import ContinuousBatchRunner
from moecluster.router.engine.engine import CLOSE_TIMEOUT_S, BatchRunner
from moecluster.router.engine.expert_counts import ExpertCounts
from moecluster.router.engine.sampler import SampledToken
from moecluster.router.engine.sequence import TokenSequence
from moecluster.router.engine.static_batching import StaticBatchRunner
from tests.support.models.engine_sequences import LIMITS, PROMPT, SAMPLED, ask, ids_of, write
from tests.support.waiting import wait_until


def test_requests_go_on_after_a_batch_that_failed(engine, cluster, monkeypatch) -> None:
    running = engine()
    expected = ids_of(write(running, ask("before")))
    pool, calls = cluster[1].pool, 0
    placement = pool.placement

    def failing(timeout_s: float = 60.0) -> object:
        nonlocal calls
        calls += 1
        if calls >= 8:
            raise KeyError("expert-1")
        return placement(timeout_s)

    with monkeypatch.context() as patches:
        patches.setattr(pool, "placement", failing)
        failed = running.begin(ask("failed"), PROMPT)
        with pytest.raises(MoeClusterError, match="expert-1"):
            list(failed)
    assert ids_of(write(running, ask("after"))) == expected


def test_a_request_that_cannot_be_begun_leaves_its_place(engine, monkeypatch) -> None:
    running = engine(replace(LIMITS, max_waiting=4))
    closing: list[BatchRunner] = []

    def no_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patches:
        for runner in (ContinuousBatchRunner, StaticBatchRunner):
            patches.setattr(runner, "is_alive", lambda runner: False)
            patches.setattr(runner, "__init__", no_memory)
            patches.setattr(runner, "close", lambda runner, timeout_s: closing.append(runner))
        for _ in range(2):
            with pytest.raises(Unavailable, match="RuntimeError: out of memory"):
                write(running, ask())
    assert running.running == 0

    added: list[BatchRunner] = []
    for runner in (ContinuousBatchRunner, StaticBatchRunner):
        note_calls(monkeypatch, runner, "add", added)
    assert len(ids_of(write(running, ask()))) == 24
    assert len(closing) == 1 and added[0] is not closing[0], "a runner that is being closed gets no sequence"
    closing[0].close(CLOSE_TIMEOUT_S)


def note_calls(patches: pytest.MonkeyPatch, runner: type[BatchRunner], method: str, called: list[BatchRunner]) -> None:
    """Adds a runner to `called` whenever its method is called."""
    sound = getattr(runner, method)

    def noted(self: BatchRunner, *arguments: Any) -> Any:
        called.append(self)
        return sound(self, *arguments)

    patches.setattr(runner, method, noted)


def fails_at(*names: str) -> Callable[[TokenSequence], bool]:
    """A predicate that selects the second token of these sequences."""
    return lambda text: text.name in names and len(text.generated_ids) == 1


def sick_sampler(patches: pytest.MonkeyPatch, sick: Callable[[TokenSequence], bool]) -> None:
    choose = token_choice._choose

    def failing(text: Any, logits_V: torch.Tensor) -> int:
        if sick(text):
            raise IndexError("no token is left")
        return choose(text, logits_V)

    patches.setattr(token_choice, "_choose", failing)


def sick_logits(patches: pytest.MonkeyPatch, sick: Callable[[TokenSequence], bool]) -> None:
    choose = token_choice.sample_tokens

    def poisoned(texts: Any, logits_BV: torch.Tensor) -> Any:
        rows = [row for row, text in enumerate(texts) if sick(text)]
        logits_BV = logits_BV.clone()
        logits_BV[rows, 5] = float("nan")
        return choose(texts, logits_BV)

    for module in (continuous_batching, static_batching):
        patches.setattr(module, "sample_tokens", poisoned)


def sick_sequence(patches: pytest.MonkeyPatch, sick: Callable[[TokenSequence], bool], method: str) -> None:
    sound = getattr(TokenSequence, method)

    def failing(self: TokenSequence, *arguments: Any) -> Any:
        if sick(self):
            raise ValueError("no such character")
        return sound(self, *arguments)

    patches.setattr(TokenSequence, method, failing)


def sick_end(patches: pytest.MonkeyPatch, sick: Callable[[TokenSequence], bool]) -> None:
    sound = TokenSequence._rest

    def failing(self: TokenSequence) -> str:
        if self.name == "sick":
            raise ValueError("no such character")
        return sound(self)

    patches.setattr(TokenSequence, "_rest", failing)


@pytest.mark.parametrize(
    "make_sick",
    [
        sick_sampler,
        sick_logits,
        partial(sick_sequence, method="_take"),
        partial(sick_sequence, method="_logprob"),
        sick_end,
    ],
    ids=["sampler", "logits", "decoder", "logprobs", "end"],
)
def test_what_goes_wrong_for_one_request_ends_that_one_alone(engine, monkeypatch, caplog, make_sick) -> None:
    running = engine()
    requests = [
        ask(name, max_new_tokens=12, sampling=SAMPLED, logprobs=True, prompt_ids=PROMPT[:length])
        for length, name in ((12, "sick"), (12, "a"), (5, "b"))
    ]
    alone = [ids_of(write(running, replace(request, request_id=f"alone-{request.request_id}"))) for request in requests]
    with monkeypatch.context() as patches:
        make_sick(patches, fails_at("sick"))
        sick, *others = [running.begin(request, request.prompt_ids) for request in requests]
        assert [ids_of(list(text)) for text in others] == alone[1:]
        with pytest.raises(RequestFailed):
            list(sick)
    assert "sequence sick ends" in caplog.text and "Traceback" in caplog.text
    wait_until(lambda: running.running == 0)
    assert ids_of(write(running, ask("sick", max_new_tokens=12, sampling=SAMPLED))) == alone[0]


def test_a_request_alone_in_a_batch_that_breaks_is_to_blame_and_several_may_be(
    engine, cluster, monkeypatch, caplog
) -> None:
    running = engine()
    pool = cluster[1].pool
    placement, num_sequences = pool.placement, 1
    push, pushed = TokenSequence.push, set[str]()  # names of sequences with a token

    def noted(sequence: TokenSequence, token: SampledToken) -> bool:
        pushed.add(sequence.name)
        return push(sequence, token)

    def failing(timeout_s: float = 60.0) -> object:
        if running.running == num_sequences == len(pushed):
            raise KeyError("expert-1")
        return placement(timeout_s)

    with monkeypatch.context() as patches:
        patches.setattr(pool, "placement", failing)
        patches.setattr(TokenSequence, "push", noted)
        with pytest.raises(RequestFailed, match="expert-1"):
            write(running, ask("alone"))
        assert "a batch of 1 sequences ended" in caplog.text and "Traceback" in caplog.text
        num_sequences = 2
        pushed.clear()
        with getattr(running._runner, "_changed", nullcontext()):  # padded: they begin in one batch
            texts = [running.begin(ask(f"r{i}", max_new_tokens=200), PROMPT) for i in range(2)]
        for text in texts:
            with pytest.raises(BatchBroken, match="expert-1"):
                list(text)


def test_a_begun_request_that_cannot_be_read_again_is_refused(engine, monkeypatch) -> None:
    running = engine()
    with monkeypatch.context() as patches:
        sick_sequence(patches, lambda text: True, "_take")
        with pytest.raises(RequestFailed, match="no such character"):
            running.begin(ask(generated_ids=(1, 2)), PROMPT)
    assert running.running == running.waiting == 0


def lose_rows(patches: pytest.MonkeyPatch, name: str) -> None:
    """Loses the first rows that a layer computes for a sequence, as if no replica had returned finite values."""
    sound, done = RemoteExperts.__call__, False
    begin_rows, here = ExpertCounts.begin_rows, threading.local()

    def noted(counts: ExpertCounts, owners: Any) -> None:
        here.counts = counts
        begin_rows(counts, owners)

    def losing(
        self: RemoteExperts, layer: int, x_TD: torch.Tensor, *rest: Any, weight_version: int, on_lost: Any
    ) -> torch.Tensor:
        nonlocal done
        y_TD = sound(self, layer, x_TD, *rest, weight_version=weight_version, on_lost=on_lost).clone()
        rows = [r for r, of in here.counts.owners(range(len(x_TD)), len(x_TD)).items() if of.startswith(f"{name}/")]
        if rows and not done:
            done = True
            y_TD[rows] = 0.0
            on_lost(layer, len(x_TD), dict.fromkeys(rows, "expert 0 of layer 1 answered NaN or infinity"))
        return y_TD

    patches.setattr(ExpertCounts, "begin_rows", noted)
    patches.setattr(RemoteExperts, "__call__", losing)


def test_lost_rows_fail_their_request_alone_and_are_kept_for_no_other_one(engine, monkeypatch) -> None:
    running = engine()
    prompt = tuple(range(60, 60 + 99))
    others = [ask(name, max_new_tokens=12, prompt_ids=PROMPT[:length]) for length, name in ((12, "a"), (5, "b"))]
    alone = [ids_of(write(running, replace(request, request_id=f"alone-{request.request_id}"))) for request in others]
    with monkeypatch.context() as patches:
        lose_rows(patches, "sick")
        sick = running.begin(ask("sick", prompt_ids=prompt, max_new_tokens=4), prompt)
        texts = [running.begin(request, request.prompt_ids) for request in others]
        with pytest.raises(RequestFailed, match="expert 0 of layer 1 answered NaN or infinity"):
            list(sick)
        assert [ids_of(list(text)) for text in texts] == alone
    after = write(running, ask("after", prompt_ids=prompt, max_new_tokens=4))
    assert after[-1].cached_tokens == 0, "nothing of the text that failed is read again"
    again = write(running, ask("again", prompt_ids=prompt, max_new_tokens=4, logprobs=True))
    fresh = engine(replace(LIMITS, max_waiting=7))
    assert ids_of(write(fresh, ask(prompt_ids=prompt, max_new_tokens=4))) == ids_of(after) == ids_of(again)

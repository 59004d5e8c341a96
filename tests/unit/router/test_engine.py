"""The engine in one process: admission, how sequences end, and resuming where another router broke off.

Continuous and static batching, on the same tiny model.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from transformers import GenerationConfig

from moecluster.errors import Exhausted, InvalidMessage, Unavailable
from moecluster.generation import SamplingParameters
from tests.support.models.engine_sequences import LIMITS, PROMPT, SAMPLED, ask, ids_of, text_of, write


@pytest.mark.parametrize("sampling", [SamplingParameters(), SAMPLED])
@pytest.mark.parametrize("received", [1, 7, 23])
def test_a_request_goes_on_behind_what_another_router_wrote(engine, sampling, received) -> None:
    running = engine()
    whole = write(running, ask(sampling=sampling, logprobs=True, top_logprobs=2))
    rest = write(
        running,
        ask(sampling=sampling, logprobs=True, top_logprobs=2, generated_ids=tuple(ids_of(whole)[:received])),
    )
    assert ids_of(rest) == ids_of(whole)[received:]
    assert text_of(whole[:received]) + text_of(rest) == text_of(whole)
    assert rest[-1].finish_reason == whole[-1].finish_reason == "length"
    assert rest[-1].prompt_tokens == len(PROMPT)
    for ours, theirs in zip(rest, whole[received:], strict=True):
        assert [p.logprob for p in ours.logprobs] == pytest.approx([p.logprob for p in theirs.logprobs], abs=1e-4)


def test_a_stop_string_across_the_break_is_found_and_never_shown(engine) -> None:
    running = engine()
    whole = text_of(write(running, ask()))
    stop = whole[8:12]
    cut = whole.index(stop)
    stopped = write(running, ask(stop=(stop,)))
    assert text_of(stopped) == whole[:cut] and stopped[-1].finish_reason == "stop"
    for received in range(1, len(ids_of(stopped))):
        shown = text_of(stopped[:received])
        rest = write(running, ask(stop=(stop,), generated_ids=tuple(ids_of(stopped)[:received])))
        assert shown + text_of(rest) == whole[:cut]


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"eos_token_id": -1, "suppress_tokens": list(range(32, 127)), "min_new_tokens": 3},
        {"do_sample": True, "temperature": 9.0, "num_beams": 2, "forced_bos_token_id": 7},
    ],
)
def test_no_setting_of_the_checkpoint_changes_a_request(engine, setting) -> None:
    expected = ids_of(write(engine(), ask()))
    assert ids_of(write(engine(settings=GenerationConfig(**setting)), ask())) == expected


def test_requests_that_ignore_their_ends_are_beside_others_what_they_are_alone(engine) -> None:
    plain = ids_of(write(engine(), ask()))
    running = engine(settings=GenerationConfig(eos_token_id=plain[4]))
    assert ids_of(write(running, ask())) == plain[: plain.index(plain[4]) + 1]
    requests = [ask(f"r{i}", prompt_ids=PROMPT[i:], ignore_eos=i % 2 == 0) for i in range(4)]
    alone = [ids_of(write(engine(), replace(request, request_id=f"alone-{i}"))) for i, request in enumerate(requests)]
    texts = [running.begin(request, request.prompt_ids) for request in requests]
    together = [ids_of(list(text)) for text in texts]
    for request, ids, whole in zip(requests, together, alone, strict=True):
        stops = plain[4] in whole and not request.ignore_eos
        assert ids == (whole[: whole.index(plain[4]) + 1] if stops else whole)


def test_the_name_of_a_cancelled_request_may_be_used_at_once(engine) -> None:
    running = engine()
    whole = ids_of(write(running, ask()))
    for _ in range(10):
        left = running.begin(ask(), PROMPT)
        next(left)
        left.close()  # the batches may learn of it when the next one is among them
        assert ids_of(list(running.begin(ask(), PROMPT))) == whole
    assert (running.running, running.waiting) == (0, 0)


def test_a_reader_that_leaves_late_does_not_end_another_request_of_its_name(engine) -> None:
    running = engine()
    left = running.begin(ask(), PROMPT)
    next(left)
    assert running.cancel(ask().request_id)
    other = running.begin(ask(), PROMPT)
    left.close()
    assert list(other)[-1].finish_reason == "length"


def test_what_was_all_written_elsewhere_only_gets_its_end(engine) -> None:
    running = engine()
    whole = write(running, ask(max_new_tokens=5))
    stop = text_of(whole)[:3]
    chunks = write(running, ask(stop=(stop,), generated_ids=tuple(ids_of(whole)[:4])))
    assert len(chunks) == 1 and chunks[0].finish_reason == "stop" and not chunks[0].ids


def test_the_last_chunk_says_what_the_request_took(engine) -> None:
    running = engine()
    chunks = write(running, ask(max_new_tokens=5))
    last = chunks[-1]
    assert (last.prompt_tokens, last.weight_version, last.finish_reason) == (len(PROMPT), 0, "length")
    layers = {expert.layer for expert in last.experts}
    # Every token but the last, which is never fed back, visits two experts of each layer.
    assert sum(last.experts.values()) == len(layers) * 2 * (len(PROMPT) + 4)


def test_a_prompt_that_was_read_before_is_not_computed_again(engine, request) -> None:
    running = engine()
    prompt = tuple(range(60, 60 + 100))
    first = write(running, ask("a", prompt_ids=prompt, max_new_tokens=4))
    again = write(running, ask("b", prompt_ids=prompt, max_new_tokens=4))
    assert ids_of(first) == ids_of(again)
    assert first[-1].cached_tokens == 0
    assert again[-1].cached_tokens == (96 if "paged" in request.node.name else 0)


def test_requests_beyond_the_bounds_are_refused_with_a_time_to_come_back(engine) -> None:
    running = engine()
    texts = [running.begin(ask(f"r{i}", max_new_tokens=220), PROMPT) for i in range(6)]
    assert (running.running, running.waiting) == (4, 2)
    with pytest.raises(Exhausted, match="4 requests run and 2 wait") as refused:
        running.begin(ask("more"), PROMPT)
    assert refused.value.retry_after_s is not None and 1 <= refused.value.retry_after_s <= 60
    for i in range(6):
        assert running.cancel(f"r{i}")
    assert (running.running, running.waiting) == (0, 0)
    assert [list(text)[-1].finish_reason for text in texts] == ["cancelled"] * 6
    assert len(ids_of(write(running, ask("after", max_new_tokens=3)))) == 3


def test_a_cancelled_request_leaves_its_place_to_the_next(engine) -> None:
    running = engine(replace(LIMITS, max_running=1))
    first = running.begin(ask("first", max_new_tokens=220), PROMPT)
    next(first)
    second = running.begin(ask("second", max_new_tokens=3), PROMPT)
    started_s = time.monotonic()
    first.close()  # its reader disconnects
    assert len(ids_of(list(second))) == 3
    assert time.monotonic() - started_s < 5.0
    assert not running.cancel("first")


def test_a_request_that_there_is_no_room_for_is_refused_by_name(engine) -> None:
    running = engine()
    with pytest.raises(InvalidMessage, match=r"prompt_ids: its 12 tokens and max_new_tokens = 5000 exceed"):
        running.begin(ask(max_new_tokens=5000), PROMPT)
    with pytest.raises(InvalidMessage, match="runs already"):
        kept = running.begin(ask("same", max_new_tokens=200), PROMPT)
        running.begin(ask("same"), PROMPT)
    kept.close()


def test_many_requests_through_few_places_are_what_each_is_alone(engine) -> None:
    running = engine(replace(LIMITS, max_waiting=40))
    requests = [
        ask(f"r{i}", prompt_ids=PROMPT[: 1 + i % len(PROMPT)], max_new_tokens=3 + i, sampling=SAMPLED)
        for i in range(20)
    ]
    alone = [ids_of(write(running, replace(request, request_id=f"alone-{i}"))) for i, request in enumerate(requests)]
    texts = [running.begin(request, request.prompt_ids) for request in requests]
    assert [ids_of(list(text)) for text in texts] == alone


def test_two_threads_may_close_an_engine_that_writes(engine) -> None:
    running = engine(replace(LIMITS, max_waiting=LIMITS.max_waiting + 1))  # a separate engine
    request = ask(max_new_tokens=200)
    text = running.begin(request, request.prompt_ids)
    next(text)
    with ThreadPoolExecutor(4) as pool:
        closings = [pool.submit(running.close) for _ in range(4)]
    assert [closing.result() for closing in closings] == [None] * 4
    with pytest.raises(Unavailable, match="router ends"):
        list(text)

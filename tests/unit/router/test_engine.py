"""The engine in one process: what it takes on, how texts end, and that one goes on from where another router broke off.

Both ways of writing, on the same tiny model.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from moecluster.dispatch.trunk_backend import TrunkExperts, VersionExperts
from moecluster.errors import BatchBroken, Exhausted, InvalidMessage, MoeClusterError, RequestFailed, Unavailable
from moecluster.generation import GenerationChunk, GenerationRequest, SamplingParameters
from moecluster.hf.interface import moe_layers
from moecluster.models.tokenizer.load import load_tokenizer
from moecluster.models.trunk import load_trunk
from moecluster.router.engine import continuous_batching, static_batching
from moecluster.router.engine import factory as making
from moecluster.router.engine import sampler as token_choice
from moecluster.router.engine.engine import Engine, EngineLimits
from moecluster.router.engine.factory import make_engine
from moecluster.router.engine.sequence import TokenSequence
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.soak.generation_load import save_decided_model

PROMPT = tuple(b"The tower of")
SAMPLED = SamplingParameters(temperature=1.2, top_p=0.95, seed=11, frequency_penalty=0.3, repetition_penalty=1.1)
LIMITS = EngineLimits(max_running=4, max_waiting=2, max_cached_tokens=2048, max_batch_tokens=32)

MakeTestEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ExpertCluster]]:
    directory = tmp_path_factory.mktemp("model")
    save_decided_model(directory)
    with ExpertCluster(directory) as running:
        yield directory, running


@pytest.fixture(scope="module", params=["paged", "padded"])
def engine(request: pytest.FixtureRequest, cluster: tuple[Path, ExpertCluster]) -> Iterator[MakeTestEngine]:
    """Makes an engine of these limits, or gives the one that was made before."""
    directory, experts = cluster
    made: dict[tuple[EngineLimits, str], Engine] = {}

    def make(limits: EngineLimits = LIMITS, settings: GenerationConfig | None = None) -> Engine:
        """settings: what stands in the checkpoint's generation_config.json."""
        kind = (limits, repr(settings))
        if kind not in made:
            backend = TrunkExperts(VersionExperts(experts.remote, 0))
            model = load_trunk(directory, backend)
            backend.layer_experts = {record.layer: record.num_experts for record in moe_layers(model)}
            model.generation_config = settings or model.generation_config
            made[kind] = make_engine(model, load_tokenizer(directory), backend, limits=limits)
        return made[kind]

    with pytest.MonkeyPatch.context() as patches:
        if request.param == "padded":
            patches.setattr(making, "supports_paging", lambda model: False)
        yield make
    for running in made.values():
        running.close()


def ask(name: str = "r", **fields: Any) -> GenerationRequest:
    return GenerationRequest(**{"request_id": name, "prompt_ids": PROMPT, "max_new_tokens": 24, **fields})


def write(engine: Engine, request: GenerationRequest) -> list[GenerationChunk]:
    return list(engine.begin(request, request.prompt_ids))


def ids_of(chunks: list[GenerationChunk]) -> list[int]:
    return [i for chunk in chunks for i in chunk.ids]


def text_of(chunks: list[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


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
    # Every token but the last, which is not read any more, visits two experts of each layer.
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
    with pytest.raises(Exhausted, match="4 texts run and 2 wait") as refused:
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
    first.close()  # its reader goes away
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
    running = engine(replace(LIMITS, max_waiting=LIMITS.max_waiting + 1))  # one of its own
    request = ask(max_new_tokens=200)
    text = running.begin(request, request.prompt_ids)
    next(text)
    with ThreadPoolExecutor(4) as pool:
        closings = [pool.submit(running.close) for _ in range(4)]
    assert [closing.result() for closing in closings] == [None] * 4
    with pytest.raises(Unavailable, match="router ends"):
        list(text)


def test_a_request_that_cannot_be_begun_leaves_its_place(engine, monkeypatch) -> None:
    running = engine(replace(LIMITS, max_waiting=4))

    def no_writer(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patches:
        patches.setattr(running._writer, "is_alive", lambda: False)
        patches.setattr(running, "_make_runner", no_writer)
        with pytest.raises(Unavailable, match="RuntimeError: out of memory"):
            write(running, ask())
    assert running.running == 0
    assert len(ids_of(write(running, ask()))) == 24


def fails_at(*names: str) -> Callable[[TokenSequence], bool]:
    """Of these texts the second token fails."""
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
    assert "text sick ends" in caplog.text and "Traceback" in caplog.text
    assert running.running == 0
    assert ids_of(write(running, ask("sick", max_new_tokens=12, sampling=SAMPLED))) == alone[0]


def test_a_request_alone_in_a_batch_that_breaks_is_to_blame_and_several_may_be(
    engine, cluster, monkeypatch, caplog
) -> None:
    running = engine()
    pool = cluster[1].pool
    placement, num_sequences = pool.placement, 1

    def failing(timeout_s: float = 60.0) -> object:
        texts = list(running._running.values())
        if len(texts) == num_sequences and all(len(text.generated_ids) for text in texts):
            raise KeyError("expert-1")
        return placement(timeout_s)

    with monkeypatch.context() as patches:
        patches.setattr(pool, "placement", failing)
        with pytest.raises(RequestFailed, match="expert-1"):
            write(running, ask("alone"))
        assert "a batch of 1 texts ended" in caplog.text and "Traceback" in caplog.text
        num_sequences = 2
        with getattr(running._writer, "_changed", nullcontext()):  # padded: they begin in one batch
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
    """The first rows of a text that a layer computes are lost, as if no replica had answered them."""
    sound, done = VersionExperts.__call__, False

    def losing(self: VersionExperts, layer: int, x_TD: torch.Tensor, *rest: Any, on_lost: Any) -> torch.Tensor:
        nonlocal done
        y_TD = sound(self, layer, x_TD, *rest, on_lost=on_lost).clone()
        rows = [r for r, of in on_lost.__self__._counts.owners(range(len(x_TD)), len(x_TD)).items() if of == name]
        if rows and not done:
            done = True
            y_TD[rows] = 0.0
            on_lost(layer, len(x_TD), dict.fromkeys(rows, "expert 0 of layer 1 answered NaN or infinity"))
        return y_TD

    patches.setattr(VersionExperts, "__call__", losing)


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

"""Benchmark figures: percentiles, goodput, and late requests measured from when they were due."""

import itertools
import random
import statistics
from typing import Any

import httpx
import pytest

from moecluster.errors import ConfigError
from moecluster.http_client.bench.request import Measured
from moecluster.http_client.bench.summary import Slo, in_flight_over_time, rate_over_time, spread, summarize
from moecluster.http_client.bench.workload import LengthRange, asks, poisson_arrivals, read_range
from moecluster.http_client.connection import gateway_url, message_of, read_api_key, retry_after_s


def measured(
    first_s: float, gaps_s: list[float], *, due_s: float = 0.0, late_s: float = 0.0, error: str = ""
) -> Measured:
    chunks_s = list(itertools.accumulate([due_s + first_s, *gaps_s]))
    return Measured(
        scheduled_s=due_s,
        sent_s=due_s + late_s,
        ended_s=chunks_s[-1],
        chunks_s=chunks_s,
        prompt_tokens=5,
        output_tokens=len(chunks_s),
        error=error,
    )


def test_percentiles_lie_between_their_neighbours() -> None:
    found = spread([float(i) for i in range(101)])
    assert found is not None
    assert (found.mean, found.p50, found.p90, found.p99, found.max) == (50.0, 50.0, 90.0, 99.0, 100.0)
    one = spread([3.0])
    assert one is not None and one.p50 == one.p99 == one.max == 3.0
    assert spread([]) is None


def test_times_count_from_when_a_request_was_due_not_from_when_it_was_sent() -> None:
    """Otherwise a service that stalls the load generator would appear to have fewer slow requests."""
    late = measured(1.5, [0.1, 0.3], due_s=2.0, late_s=1.0)
    assert late.time_to_first_token_s == pytest.approx(1.5) and late.request_s == pytest.approx(1.9)
    assert late.inter_token_s == pytest.approx([0.1, 0.3]) and late.time_per_token_s == pytest.approx(0.2)
    summary = summarize([late], Slo())
    assert summary.sent_late_s is not None and summary.sent_late_s.max == pytest.approx(1.0)


def test_throughput_and_errors() -> None:
    summary = summarize([measured(1.0, [0.5, 0.5]), measured(1.0, [3.0]), measured(9.0, [], error="timeout")], Slo())
    assert (summary.requests, summary.completed, summary.errors) == (3, 2, {"timeout": 1})
    assert summary.duration_s == 9.0 and summary.output_tokens == 5 and summary.prompt_tokens == 10
    assert summary.output_tokens_per_s == pytest.approx(5 / 9) and summary.requests_per_s == pytest.approx(2 / 9)
    assert summary.time_to_first_token_s is not None and summary.time_to_first_token_s.max == 1.0
    assert summary.good is None and summary.goodput_per_s is None


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"time_to_first_token_s": 0.5}, 3),
        ({"time_to_first_token_s": 0.05}, 1),
        ({"inter_token_s": 0.11}, 3),
        ({"inter_token_s": 0.05}, 2),
        ({"time_to_first_token_s": 0.05, "inter_token_s": 0.05}, 1),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit_and_no_failed_one(limits: dict[str, Any], good: int) -> None:
    requests = [
        measured(0.1, [0.1, 0.1]),
        measured(0.1, [0.01, 0.01]),
        measured(0.01, []),  # one token: no inter-token time
        measured(1.0, [0.2]),
        measured(0.01, [0.01], error="connection lost"),
    ]
    summary = summarize(requests, Slo(**limits))
    assert summary.good == good and summary.goodput_per_s == pytest.approx(good / summary.duration_s)


def test_nothing_measured_is_no_division_by_zero() -> None:
    summary = summarize([], Slo(inter_token_s=1.0))
    assert summary.requests_per_s == 0.0 and summary.good == 0 and summary.request_s is None


def test_rates_and_requests_under_way_over_time() -> None:
    times_s, rates = rate_over_time([0.1, 0.2, 1.5], 2.0, 2)
    assert times_s == [0.5, 1.5] and rates == [2.0, 1.0]
    at_s, levels = in_flight_over_time([measured(2.0, []), measured(0.5, [], due_s=1.0)])
    assert at_s == [0.0, 1.0, 1.5, 2.0] and levels == [1, 2, 1, 0]


def test_arrivals_have_the_rate_and_are_the_same_again() -> None:
    times_s = list(itertools.islice(poisson_arrivals(50.0, 3), 5000))
    gaps_s = [after - before for before, after in itertools.pairwise(times_s)]
    assert statistics.mean(gaps_s) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps_s) == pytest.approx(1 / 50, rel=0.05)  # as for exponential gaps
    assert times_s == list(itertools.islice(poisson_arrivals(50.0, 3), 5000))


def test_requests_keep_their_ranges_and_are_the_same_again() -> None:
    ranges: dict[str, Any] = {"input_tokens": LengthRange(lowest=2, highest=5), "output_tokens": read_range("7", "--x")}
    drawn = list(itertools.islice(asks(seed=1, vocab_size=10, **ranges), 500))
    assert {len(ask.prompt) for ask in drawn} == {2, 3, 4, 5} and {ask.output_tokens for ask in drawn} == {7}
    assert {token for ask in drawn for token in ask.prompt} == set(range(10))
    assert drawn == list(itertools.islice(asks(seed=1, vocab_size=10, **ranges), 500))
    words = [f"w{i}" for i in range(20)]
    for ask in itertools.islice(asks(seed=1, vocab_size=10, words=words, **ranges), 50):
        assert isinstance(ask.prompt, str)
        part = ask.prompt.split(" ")
        assert part == words[words.index(part[0]) :][: len(part)] and 2 <= len(part) <= 5
    (short,) = itertools.islice(asks(seed=1, vocab_size=10, words=["only"], **ranges), 1)
    assert short.prompt == "only"


@pytest.mark.parametrize("text", ["", "0", "5-3", "a-b", "-3", "1-99999999", "1.5"])
def test_a_wrong_range_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--input-tokens: got"):
        read_range(text, "--input-tokens")


def test_ranges() -> None:
    assert read_range(" 64-256 ", "--x") == LengthRange(lowest=64, highest=256)
    assert read_range("8", "--x").draw(random.Random(0)) == 8


@pytest.mark.parametrize(
    ("output", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(output: str, seconds: float | None) -> None:
    assert retry_after_s(httpx.Headers({"Retry-After": output}), 60.0) == seconds
    assert retry_after_s(httpx.Headers(), 60.0) is None


def test_a_date_to_retry_after_counts_from_the_servers_own_clock() -> None:
    headers = httpx.Headers({"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT", "Date": "Thu, 01 Jan 1970 00:01:30 GMT"})
    assert retry_after_s(headers, 60.0) == retry_after_s(headers, 1e6) == 10.0
    headers["Date"] = "just now"
    assert retry_after_s(headers, 60.0) == 40.0


def test_the_gateways_address_with_or_without_its_version() -> None:
    for text in ("http://h:8000", "http://h:8000/", "http://h:8000/v1", "http://h:8000/v1/"):
        assert gateway_url(text) == httpx.URL("http://h:8000")
    for text in ("h:8000", "", "ftp://h", "http://", "http://h:port"):
        with pytest.raises(ConfigError, match="--base-url"):
            gateway_url(text)


def test_a_key_that_is_none_is_refused_without_being_shown(monkeypatch) -> None:
    assert read_api_key("MOECLUSTER_NO_SUCH_VARIABLE") == ""
    monkeypatch.setenv("A_KEY", "sk-1 \n")
    assert read_api_key("A_KEY") == "sk-1"
    monkeypatch.setenv("A_KEY", "sk-1\nX-Other: 1")
    with pytest.raises(ConfigError, match=r"^\$A_KEY: holds characters") as caught:
        read_api_key("A_KEY")
    assert "sk-1" not in str(caught.value)


def test_what_an_answer_complains_about_is_one_line() -> None:
    assert message_of({"error": {"message": "a\nb"}}) == "a b"
    assert message_of("<html>\n" + "x" * 1000).startswith("<html> xxx") and len(message_of("x" * 1000)) == 300

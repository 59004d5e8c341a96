"""bench serve: load-tests an HTTP gateway; prints a table, writes results as JSON and a plot."""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moecluster.cli.common.event_loop import run_until_signalled
from moecluster.cli.common.output_files import check_writable, write_report
from moecluster.cli.common.tables import make_table, show_table
from moecluster.errors import ConfigError, Unavailable
from moecluster.http_client.bench.load import OnEnd, closed_loop, open_loop
from moecluster.http_client.bench.request import Measured, Sender
from moecluster.http_client.bench.summary import Slo, Spread, Summary, summarize
from moecluster.http_client.bench.workload import Ask, asks, poisson_arrivals, read_range, read_words
from moecluster.http_client.connection import json_of, message_of, open_gateway, read_api_key

MOST_SECONDS_IN_MS = 10.0
DEFAULT_CONCURRENCY = 8
DEFAULT_PROMPTS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadChoice:
    """The user's options."""

    base_url: str
    api_key_env: str
    model: str  # empty: the first that the gateway lists
    request_rate: float | None
    concurrency: int | None
    num_prompts: int | None
    duration_s: float | None
    input_tokens: str
    output_tokens: str
    vocab_size: int
    text: Path | None
    temperature: float
    ignore_eos: bool
    seed: int
    warmup: int
    max_in_flight: int
    timeout_s: float
    slo_ttft_ms: float | None
    slo_itl_ms: float | None
    plot: Path | None = None
    json: Path | None = None


@dataclasses.dataclass(kw_only=True)
class _Seen:
    """The requests measured so far, in the order in which they ended; all of them once the load is over."""

    model: str = ""
    measured: list[Measured] = dataclasses.field(default_factory=list)


def bench_serve(choice: LoadChoice, console: Console) -> None:
    """Puts the load on the gateway, and shows the clients' measurements."""
    choice = _checked(choice)
    api_key = read_api_key(choice.api_key_env)
    words = read_words(choice.text) if choice.text is not None else []
    seen = _Seen()
    try:
        run_until_signalled(_measure(choice, api_key, words, seen, console))
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C and SIGTERM
        if not seen.measured:
            console.print("ended before any request had: nothing was measured")
            raise
        console.print("ended early: requests that were under way do not count")
        _report(choice, seen, console, interrupted=True)
        raise
    if not _report(choice, seen, console, interrupted=False).completed and seen.measured:
        raise Unavailable("no request ended as it should")


def _report(choice: LoadChoice, seen: "_Seen", console: Console, *, interrupted: bool) -> Summary:
    """Shows and writes the results."""
    slo = _slo(choice)
    summary = summarize(seen.measured, slo)
    title = f"{seen.model} at {choice.base_url}: {_load_name(choice)}"
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    show_table(_times_table(summary), console)
    show_table(_totals_table(summary, slo), console)
    _show_errors(seen.measured, console)
    load = {**dataclasses.asdict(choice), "model": seen.model, "text": _shown(choice.text)}
    report = {
        "load": {name: value for name, value in load.items() if name not in ("plot", "json")},
        "interrupted": interrupted,
        "summary": dataclasses.asdict(summary),
        "requests": [dataclasses.asdict(m) for m in seen.measured],
    }
    write_report(choice.json, report, console)
    if choice.plot is not None:
        from moecluster.http_client.bench.plot import draw_load  # needs matplotlib

        draw_load(seen.measured, slo, title, choice.plot)
        console.print(f"as a picture: {choice.plot}", highlight=False, soft_wrap=True)
    return summary


def _checked(choice: LoadChoice) -> LoadChoice:
    """Returns the options with defaults filled in. Raises ConfigError before anything is sent."""
    if choice.request_rate is not None and choice.concurrency is not None:
        raise ConfigError("--request-rate, --concurrency: give one of them: requests that come, or clients that wait")
    if choice.num_prompts is not None and choice.duration_s is not None:
        raise ConfigError("--num-prompts, --duration-s: give one of them")
    for option, value in (
        ("--request-rate", choice.request_rate),
        ("--duration-s", choice.duration_s),
        ("--timeout-s", choice.timeout_s),
        ("--slo-ttft-ms", choice.slo_ttft_ms),
        ("--slo-itl-ms", choice.slo_itl_ms),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option}: got {value:g}, expected more than 0")
    read_range(choice.input_tokens, "--input-tokens")
    read_range(choice.output_tokens, "--output-tokens")
    check_writable(choice.plot, choice.json)
    if choice.request_rate is None and choice.concurrency is None:
        choice = dataclasses.replace(choice, concurrency=DEFAULT_CONCURRENCY)
    if choice.num_prompts is None and choice.duration_s is None:
        choice = dataclasses.replace(choice, num_prompts=DEFAULT_PROMPTS)
    return choice


async def _measure(choice: LoadChoice, api_key: str, words: list[str], seen: "_Seen", console: Console) -> None:
    """Runs the load; records the model's name, and every request as it ends."""
    connections = choice.concurrency or choice.max_in_flight
    async with open_gateway(
        choice.base_url, api_key=api_key, max_connections=connections, timeout_s=choice.timeout_s
    ) as gateway:
        seen.model = choice.model or await _first_model(gateway)
        sender = Sender(
            gateway,
            model=seen.model,
            temperature=choice.temperature,
            ignore_eos=choice.ignore_eos,
            timeout_s=choice.timeout_s,
        )
        to_ask = asks(
            seed=choice.seed,
            input_tokens=read_range(choice.input_tokens, "--input-tokens"),
            output_tokens=read_range(choice.output_tokens, "--output-tokens"),
            vocab_size=choice.vocab_size,
            words=words,
        )
        for _ in range(choice.warmup):
            warm = await sender.send(next(to_ask), started_s=time.perf_counter())
            if warm.error:
                raise Unavailable(f"{choice.base_url}: a request before the load failed ({warm.error}: {warm.detail})")
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("requests"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=choice.num_prompts)

            def on_end(measured: Measured) -> None:
                seen.measured.append(measured)
                bar.advance(task)

            seen.measured = await _load(choice, sender, to_ask, on_end)


async def _load(choice: LoadChoice, sender: Sender, to_ask: Iterator[Ask], on_end: OnEnd) -> list[Measured]:
    if choice.request_rate is not None:
        return await open_loop(
            sender,
            to_ask,
            poisson_arrivals(choice.request_rate, choice.seed),
            num_prompts=choice.num_prompts,
            duration_s=choice.duration_s,
            on_end=on_end,
        )
    assert choice.concurrency is not None, "checked"
    return await closed_loop(
        sender,
        to_ask,
        concurrency=choice.concurrency,
        num_prompts=choice.num_prompts,
        duration_s=choice.duration_s,
        on_end=on_end,
    )


async def _first_model(gateway: httpx.AsyncClient) -> str:
    """Returns the first model that the gateway lists. Raises Unavailable, or ConfigError for a wrong key."""
    try:
        answer = await gateway.get("/v1/models")
    except httpx.RequestError as exc:
        raise Unavailable(f"{gateway.base_url}: cannot be reached ({exc or type(exc).__name__})") from exc
    body = json_of(answer.content)
    if answer.status_code in (401, 403):
        raise ConfigError(f"{gateway.base_url}: refuses the API key ({message_of(body)})")
    try:
        return str(body["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as exc:
        raise Unavailable(
            f"{gateway.base_url}: names no model ({answer.status_code}: {message_of(body)}); give its --model"
        ) from exc


def _slo(choice: LoadChoice) -> Slo:
    first_ms, token_ms = choice.slo_ttft_ms, choice.slo_itl_ms
    return Slo(
        time_to_first_token_s=None if first_ms is None else first_ms / 1e3,
        inter_token_s=None if token_ms is None else token_ms / 1e3,
    )


def _load_name(choice: LoadChoice) -> str:
    if choice.request_rate is not None:
        return f"{choice.request_rate:g} requests a second, coming at random"
    return f"{choice.concurrency} clients at once"


def _times_table(summary: Summary) -> Table:
    figures = ("mean", "p50", "p90", "p99", "max")
    table = make_table("", *figures, prose=("",), right=figures, box=None, pad_edge=False)
    for name, found in (
        ("time to first token", summary.time_to_first_token_s),
        ("between two tokens", summary.inter_token_s),
        ("a token after the first, mean of a request", summary.time_per_token_s),
        ("a whole request", summary.request_s),
        ("sent late by this program", summary.sent_late_s),
    ):
        table.add_row(name, *_cells(found))
    return table


def _totals_table(summary: Summary, slo: Slo) -> Table:
    table = make_table("", "value", prose=("",), right=("value",), box=None, pad_edge=False, show_header=False)
    for name, value in _totals(summary, slo):
        table.add_row(name, value)
    return table


def _totals(summary: Summary, slo: Slo) -> list[tuple[str, str]]:
    rows = [
        ("requests, completed", f"{summary.requests:,}, {summary.completed:,}"),
        ("duration", f"{summary.duration_s:,.1f} s"),
        ("requests a second", f"{summary.requests_per_s:,.2f}"),
        ("output tokens a second", f"{summary.output_tokens_per_s:,.1f}"),
        ("prompt tokens, output tokens", f"{summary.prompt_tokens:,}, {summary.output_tokens:,}"),
    ]
    if summary.good is not None and summary.goodput_per_s is not None:
        limits = [
            f"{name} {1e3 * limit_s:g} ms"
            for name, limit_s in (("first token", slo.time_to_first_token_s), ("mean token", slo.inter_token_s))
            if limit_s is not None
        ]
        part = 100 * summary.good / max(summary.requests, 1)
        rows.append((f"goodput ({', '.join(limits)})", f"{summary.goodput_per_s:,.2f} a second ({part:.1f} %)"))
    rows += [(f"failed: {kind}", f"{count:,}") for kind, count in sorted(summary.errors.items())]
    return rows


def _cells(found: Spread | None) -> list[str]:
    if found is None:
        return [""] * 5
    return [_seconds(value) for value in (found.mean, found.p50, found.p90, found.p99, found.max)]


def _seconds(value: float) -> str:
    return f"{1e3 * value:,.1f} ms" if value < MOST_SECONDS_IN_MS else f"{value:,.1f} s"


def _show_errors(measured: list[Measured], console: Console) -> None:
    """Prints one example of each kind of error."""
    examples = {m.error: m.detail for m in reversed(measured) if m.error}
    for kind, detail in sorted(examples.items()):
        console.print(f"{kind}: {detail}", highlight=False, markup=False, soft_wrap=True)


def _shown(path: Path | None) -> str | None:
    return None if path is None else str(path)

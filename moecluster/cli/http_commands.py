"""The commands that send requests to a service over HTTP: they need neither torch nor Ray, and start at once."""

from pathlib import Path
from typing import Annotated

import typer

from moecluster.cli.common.console import make_console

FRONT = "http://127.0.0.1:8000"  # where moecluster serve listens by default
KEY_VARIABLE = "MOECLUSTER_API_KEY"

bench = typer.Typer(help="Measure a service.", no_args_is_help=True)

BaseUrl = Annotated[
    str, typer.Option(help="the HTTP front, as moecluster serve runs it", show_default="port 8000 of this host")
]
KeyVariable = Annotated[str, typer.Option(help="the environment variable that holds the API key, if the front asks")]


def add_to(app: typer.Typer) -> None:
    """Makes these commands part of the command line."""
    app.command(epilog="Example: moecluster batch requests.jsonl answers.jsonl --concurrency 64")(batch)
    app.add_typer(bench, name="bench")


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="requests, in OpenAI's batch format")],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="the answers, in the order of the requests")],
    base_url: BaseUrl = FRONT,
    cluster: Annotated[
        str, typer.Option(help="without a front: the name of a cluster that moecluster up started here")
    ] = "",
    concurrency: Annotated[int, typer.Option(help="requests under way at once", min=1, max=4096)] = 32,
    attempts: Annotated[int, typer.Option(help="for a request that breaks or gets a 5xx", min=1)] = 5,
    patience_s: Annotated[float, typer.Option(help="for a front that is away or takes no requests", min=0.0)] = 600.0,
    timeout_s: Annotated[float, typer.Option(help="longest wait for one answer", min=1.0)] = 600.0,
    api_key_env: KeyVariable = KEY_VARIABLE,
) -> None:
    """Send a file of requests through the front. After a crash, the same command goes on where it was."""
    from moecluster.cli.commands.batch import BatchChoice
    from moecluster.cli.commands.batch import batch as run

    choice = BatchChoice(
        base_url=base_url,
        cluster=cluster,
        api_key_env=api_key_env,
        concurrency=concurrency,
        attempts=attempts,
        patience_s=patience_s,
        timeout_s=timeout_s,
    )
    run(source, out, choice, make_console())


@bench.callback()
def group() -> None:
    """Measure a service."""  # a callback keeps `serve` a sub-command though it is the only one


@bench.command(
    epilog="Example: moecluster bench serve --request-rate 8 --duration-s 60 --slo-ttft-ms 500 --plot load.png"
)
def serve(
    base_url: BaseUrl = FRONT,
    request_rate: Annotated[
        float | None, typer.Option(help="requests a second, coming at random (Poisson), whether answered or not")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="clients that each wait for their answer; default: 8", min=1, max=4096)
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="requests in all; default: 100", min=1)] = None,
    duration_s: Annotated[float | None, typer.Option(help="how long new requests are sent, instead")] = None,
    input_tokens: Annotated[str, typer.Option(help="length of a prompt, or a range; of words with --text")] = "64-256",
    output_tokens: Annotated[str, typer.Option(help="length of an answer, or a range")] = "64-128",
    text: Annotated[
        Path | None, typer.Option(help="a file to cut prompts from; else they are random token ids")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="random token ids lie below it", min=1)] = 256,
    model: Annotated[str, typer.Option(help="its name; default: the first that the front serves")] = "",
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0.0)] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="answers are as long as was asked for")] = True,
    seed: Annotated[int, typer.Option(help="of prompts, lengths and arrivals")] = 0,
    warmup: Annotated[int, typer.Option(help="requests before, one by one, that do not count", min=0)] = 1,
    max_in_flight: Annotated[int, typer.Option(help="most connections with --request-rate", min=1, max=65536)] = 1024,
    timeout_s: Annotated[float, typer.Option(help="longest whole request")] = 600.0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="a good request's first token comes within it")] = None,
    slo_itl_ms: Annotated[float | None, typer.Option(help="and its other tokens each in this time, on average")] = None,
    api_key_env: KeyVariable = KEY_VARIABLE,
    plot: Annotated[Path | None, typer.Option(help="draw a picture here: .png, .svg or .pdf")] = None,
    json: Annotated[Path | None, typer.Option(help="write every figure here")] = None,
) -> None:
    """Put load on an HTTP front: time to first token, time between tokens, throughput, goodput under an SLO, errors."""
    from moecluster.cli.commands.bench import LoadChoice, bench_serve

    choice = LoadChoice(
        base_url=base_url,
        api_key_env=api_key_env,
        model=model,
        request_rate=request_rate,
        concurrency=concurrency,
        num_prompts=num_prompts,
        duration_s=duration_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        vocab_size=vocab_size,
        text=text,
        temperature=temperature,
        ignore_eos=ignore_eos,
        seed=seed,
        warmup=warmup,
        max_in_flight=max_in_flight,
        timeout_s=timeout_s,
        slo_ttft_ms=slo_ttft_ms,
        slo_itl_ms=slo_itl_ms,
        plot=plot,
        json=json,
    )
    bench_serve(choice, make_console())

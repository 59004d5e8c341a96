"""Commands that send requests over HTTP: they need neither torch nor Ray, and start at once."""

from pathlib import Path
from typing import Annotated

import typer

from moecluster.cli.common.console import make_console

GATEWAY = "http://127.0.0.1:8000"  # where moecluster serve listens by default
KEY_VARIABLE = "MOECLUSTER_API_KEY"

bench = typer.Typer(help="Run a load test.", no_args_is_help=True)

BaseUrl = Annotated[
    str, typer.Option(help="URL of the HTTP gateway (moecluster serve)", show_default="port 8000 of this host")
]
KeyVariable = Annotated[str, typer.Option(help="environment variable with the API key, if the gateway requires one")]


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(epilog="Example: moecluster batch requests.jsonl answers.jsonl --concurrency 64")(batch)
    app.add_typer(bench, name="bench")


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="requests, in OpenAI's batch format")],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="responses, in the order of the requests")],
    base_url: BaseUrl = GATEWAY,
    cluster: Annotated[
        str,
        typer.Option(
            metavar="NAME|HOST:PORT",
            help="use this cluster instead of a gateway: one started here, or its controller's address with "
            "$MOECLUSTER_SECRET_FILE",
            show_default=False,
        ),
    ] = "",
    concurrency: Annotated[int, typer.Option(help="requests in flight", min=1, max=4096)] = 32,
    attempts: Annotated[
        int, typer.Option(help="attempts per failing request (lost connection, timeout, 5xx)", min=1)
    ] = 5,
    patience_s: Annotated[float, typer.Option(help="how long to wait for an unavailable gateway", min=0.0)] = 600.0,
    timeout_s: Annotated[float, typer.Option(help="longest wait for a response", min=1.0)] = 600.0,
    api_key_env: KeyVariable = KEY_VARIABLE,
) -> None:
    """Send a file of requests through the gateway. After a crash, run the same command again to resume."""
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
    """Run a load test."""  # a callback keeps `serve` a subcommand although it is the only one


@bench.command(
    epilog="Example: moecluster bench serve --request-rate 8 --duration-s 60 --slo-ttft-ms 500 --plot load.png"
)
def serve(
    base_url: BaseUrl = GATEWAY,
    request_rate: Annotated[
        float | None, typer.Option(help="requests per second (Poisson), sent regardless of responses")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="clients that each wait for their response; default: 8", min=1, max=4096)
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="total number of requests; default: 100", min=1)] = None,
    duration_s: Annotated[float | None, typer.Option(help="seconds to send requests for, instead")] = None,
    input_tokens: Annotated[str, typer.Option(help="prompt length, or a range; in words with --text")] = "64-256",
    output_tokens: Annotated[str, typer.Option(help="response length, or a range")] = "64-128",
    text: Annotated[Path | None, typer.Option(help="text file to take prompts from; default: random token ids")] = None,
    vocab_size: Annotated[int, typer.Option(help="upper bound of random token ids (exclusive)", min=1)] = 256,
    model: Annotated[str, typer.Option(help="model name; default: the first that the gateway lists")] = "",
    temperature: Annotated[float, typer.Option(help="sampling temperature; 0 is greedy", min=0.0)] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="generate exactly the requested number of tokens")] = True,
    seed: Annotated[int, typer.Option(help="seed of prompts, lengths and arrivals")] = 0,
    warmup: Annotated[int, typer.Option(help="sequential requests before the load, not measured", min=0)] = 1,
    max_in_flight: Annotated[int, typer.Option(help="most connections with --request-rate", min=1, max=65536)] = 1024,
    timeout_s: Annotated[float, typer.Option(help="longest time of a whole request")] = 600.0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="SLO: longest time to first token")] = None,
    slo_itl_ms: Annotated[float | None, typer.Option(help="SLO: longest mean time per further token")] = None,
    api_key_env: KeyVariable = KEY_VARIABLE,
    plot: Annotated[Path | None, typer.Option(help="write a plot here: .png, .svg or .pdf")] = None,
    json: Annotated[Path | None, typer.Option(help="write all results here as JSON")] = None,
) -> None:
    """Load-test an HTTP gateway: time to first token, inter-token latency, throughput, goodput under an SLO, errors."""
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

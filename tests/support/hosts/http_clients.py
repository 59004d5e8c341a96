"""HTTP clients of a gateway, as a program: a namespace's network is that of a process, not of a test.

usage: python -m tests.support.hosts.http_clients load|once URL MODEL NUMBER NEW_TOKENS PROMPTS.json
load: clients that stream one request after another until standard input ends; once: one sampled request a prompt.
Prints the requests as JSON.
"""

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tests.support.hosts.namespace import Namespace
from tests.support.soak.http_load import REQUEST_TIMEOUT_S, HttpClients, StreamedRequest, stream_request

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.support.hosts.http_clients"
READY = "ready"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked for."""

    url: str
    model: str
    prompts: Sequence[str]
    clients: int
    new_tokens: int


class ClientsIn:
    """Clients in a namespace, from __enter__ to __exit__; then `texts` are what they received."""

    def __init__(self, namespace: Namespace, load: Load, mode: str = "load") -> None:
        self.texts: list[StreamedRequest] = []
        self._namespace, self._load, self._mode = namespace, load, mode

    def __enter__(self) -> Self:
        load = self._load
        prompts = self._namespace.home / "prompts.json"
        prompts.write_text(json.dumps(load.prompts))
        numbers = (str(load.clients), str(load.new_tokens))
        words = (sys.executable, "-m", MODULE, self._mode, load.url, load.model, *numbers, str(prompts))
        self._process = subprocess.Popen(
            self._namespace.command(*words),
            env={**self._namespace.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None and self._process.stdout.readline().strip() == READY
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        output, _error = self._process.communicate("", timeout=2 * REQUEST_TIMEOUT_S)  # ends standard input
        if kind is None:
            self.texts = [StreamedRequest(**fields) for fields in json.loads(output)]


def once(namespace: Namespace, load: Load) -> dict[str, str]:
    """Returns the sampled output of every prompt."""
    with ClientsIn(namespace, load, "once") as clients:
        pass
    assert not any(text.failure for text in clients.texts), clients.texts
    return {text.prompt: text.text for text in clients.texts}


async def ask_once(load: Load) -> list[StreamedRequest]:
    """Returns one sampled request for each prompt."""
    async with httpx.AsyncClient(base_url=load.url, timeout=REQUEST_TIMEOUT_S) as client:
        return [
            await stream_request(client, load.model, prompt, new_tokens=load.new_tokens, sampled=True)
            for prompt in load.prompts
        ]


def _main(mode: str, url: str, model: str, clients: str, new_tokens: str, prompts: str) -> None:
    load = Load(
        url=url,
        model=model,
        prompts=json.loads(Path(prompts).read_text()),
        clients=int(clients),
        new_tokens=int(new_tokens),
    )
    print(READY, flush=True)
    if mode == "once":
        texts = asyncio.run(ask_once(load))
    else:
        running = HttpClients(load.url, load.model, load.prompts, number=load.clients, new_tokens=load.new_tokens)
        with running:
            sys.stdin.read()
        texts = running.texts
    print(json.dumps([dataclasses.asdict(text) for text in texts]))


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Generation requests, each broken in one of many ways; the same in every run. Some are raw bytes."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from moecluster.proto import router_pb2

Break = Callable[[random.Random, router_pb2.GenerateRequest], object]

ODD_NUMBERS = (math.nan, math.inf, -math.inf, -1.0, -1e300, 1e300, 1e9)


def good() -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(request_id="r", prompt="x", max_new_tokens=2)


def no_name(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.request_id = rng.choice(["", "\n", "x" * 300, "\x00", "a\x7fb"])


def no_prompt(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.prompt = ""


def two_prompts(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    rng.choice([lambda: request.prompt_ids.append(5), lambda: setattr(request, "messages_json", "[]")])()


def huge_prompt(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.prompt = "x" * (2**20 + rng.randint(1, 2000))


def strange_ids(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.prompt = ""
    request.prompt_ids.extend([5, rng.choice([-1, 259, 2**31 - 1, -(2**31)])])


def strange_generated_ids(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.generated_ids.append(rng.choice([-1, 259, 2**31 - 1]))


def more_than_wanted(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.generated_ids.extend([65] * rng.randint(3, 9))


def version_of_nothing(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.weight_version = rng.choice([1, 2, 2**64 - 1])


def strange_length(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.max_new_tokens = rng.choice([-1, -(2**31), 2**31 - 1, 2**16, 1000])


def strange_messages(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.prompt = ""
    request.messages_json = rng.choice(
        [
            "{}",
            "[]",
            "null",
            "[1]",
            '[{"role": "user"}]',
            '[{"role": 5, "content": "x"}]',
            '[{"role": "user", "content": ["x"]}]',
            '[{"role": "user", "content": "x"}]',  # this checkpoint has no chat template
            "[" * 5000,
            "nothing",
            '[{"role": "user", "content": "x"}',
            "NaN",
        ]
    )


def strange_stop(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.stop.extend(rng.choice([[""], ["x" * 2000], ["x"] * 17]))


def strange_number(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    field = rng.choice(["temperature", "top_p", "min_p", "repetition_penalty"])
    setattr(request, field, rng.choice(ODD_NUMBERS))


def strange_penalty(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    field = rng.choice(["presence_penalty", "frequency_penalty"])
    setattr(request, field, rng.choice([math.nan, math.inf, -math.inf, 1e300, -1e9]))


def strange_top_k(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.top_k = rng.choice([-1, -(2**31), 2**31 - 1])


def strange_logprobs(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    request.top_logprobs = rng.choice([-1, 21, 2**31 - 1, -(2**31)])


def strange_bias(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    token, bias = rng.choice([(-1, 1.0), (259, 1.0), (5, math.nan), (5, math.inf), (5, 1e300)])
    request.logit_bias[token] = bias


def many_biases(rng: random.Random, request: router_pb2.GenerateRequest) -> None:
    for token in range(1025 + rng.randrange(10)):
        request.logit_bias[token] = 1.0


BREAKS: tuple[Break, ...] = (
    no_name,
    no_prompt,
    two_prompts,
    huge_prompt,
    strange_ids,
    strange_generated_ids,
    more_than_wanted,
    version_of_nothing,
    strange_length,
    strange_messages,
    strange_stop,
    strange_number,
    strange_penalty,
    strange_top_k,
    strange_logprobs,
    strange_bias,
    many_biases,
)


def malformed_requests(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yields (what is wrong, serialized message). Cycles through all kinds; every tenth is raw bytes."""
    rng = random.Random(seed)
    for number in range(count):
        if number % 10 == 9:
            yield "raw_bytes", _torn(rng)
            continue
        wrong: Any = BREAKS[number % len(BREAKS)]
        request = good()
        wrong(rng, request)
        yield wrong.__name__, request.SerializeToString()


def _torn(rng: random.Random) -> bytes:
    """Returns bytes that are no message: a field longer than the data, or an invalid wire type."""
    return rng.choice([b"\x12\x7f", b"\x0f", b"\x0a\xff\xff\xff\xff\x0f"]) + rng.randbytes(rng.randrange(3))

"""Costs in the simulator, calibrated from the results of benchmarks/layer.py."""

import json
import math
import re
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from moecluster.errors import ConfigError
from moecluster.placement.layout import Floats

# The layer that benchmarks/layer.py measures: two actors of one thread each, half of the experts on each.
BENCH_WIDTH, BENCH_INNER, BENCH_EXPERTS, BENCH_TOP_K, BENCH_ACTORS = 1024, 3584, 8, 2, 2
BENCH_ROW_BYTES = 2 * 2 * BENCH_WIDTH  # bfloat16, there and back
BENCH_EXPERT_BYTES = 2 * 3 * BENCH_WIDTH * BENCH_INNER  # gate, up and down in bfloat16

_MEASURED = re.compile(r"ours: forward, bfloat16, (\d+) tokens, (shm|inline)")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of one actor of speed 1 on one kind of hardware.

    The defaults are what `calibrated` returns for benchmarks/results/layer.json as of November 2026: two cores of an
    AMD EPYC, so they describe CPU actors of one thread each. For other hardware, run the benchmark there.
    """

    message_s: float = 5.4e-3  # an MoE layer's fixed time: index work, a message there and back, thread hand-offs
    expert_s: float = 4.1e-4  # for each expert that an actor computes in a layer: its weights are read from memory
    row_s: float = 7.1e-5  # for each (row, expert) pair
    row_bytes: float = float(BENCH_ROW_BYTES)  # one row, there and back
    link_bytes_per_s: float = 3.9e8  # what one actor's link carries, both ways together: inline gRPC over loopback

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0 or (value == 0 and field.name in ("row_s", "link_bytes_per_s")):
                raise ConfigError(f"cost {field.name}: got {value:g}, expected more than 0")


def calibrated(path: str | Path) -> Costs:
    """Returns the costs that best explain a result file of benchmarks/layer.py.

    Shared-memory times over the batch sizes are fitted by non-negative least squares of relative errors as
    message_s + experts touched * expert_s + pairs of an actor * row_s. The link's bandwidth follows from the time that
    inline transport adds at the largest batch; if noise hides it, the default is kept. Raises ConfigError if the file
    cannot be read or lacks such figures.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        times_ms = _times(rows)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no result of benchmarks/layer.py") from error
    shared = {tokens: ms / 1e3 for (tokens, transport), ms in times_ms.items() if transport == "shm"}
    if len(shared) < 3:
        raise ConfigError(f"{path}: has {len(shared)} batch sizes over shared memory, expected at least 3")
    tokens_M = np.array(sorted(shared), dtype=np.float64)
    seconds_M = np.array([shared[int(tokens)] for tokens in tokens_M])
    terms_M3 = np.stack([np.ones_like(tokens_M), touched(tokens_M), tokens_M * BENCH_TOP_K / BENCH_ACTORS], axis=1)
    (message_s, expert_s, row_s), _ = nnls(terms_M3 / seconds_M[:, None], np.ones_like(seconds_M))
    largest = int(tokens_M[-1])
    added_s = times_ms.get((largest, "inline"), 0.0) / 1e3 - shared[largest]
    sent_bytes = largest * _part_of_tokens_to_an_actor() * BENCH_ROW_BYTES
    link = sent_bytes / added_s if added_s > 0 else Costs.link_bytes_per_s
    return Costs(message_s=float(message_s), expert_s=float(expert_s), row_s=float(row_s), link_bytes_per_s=float(link))


def touched(tokens: Floats) -> Floats:
    """Returns how many of a benchmark actor's experts a batch of this many tokens is expected to touch."""
    experts: Floats = BENCH_EXPERTS / BENCH_ACTORS * (1 - (1 - BENCH_TOP_K / BENCH_EXPERTS) ** tokens)
    return experts


def _part_of_tokens_to_an_actor() -> float:
    elsewhere = BENCH_EXPERTS - BENCH_EXPERTS // BENCH_ACTORS
    return 1 - math.comb(elsewhere, BENCH_TOP_K) / math.comb(BENCH_EXPERTS, BENCH_TOP_K)


def _times(rows: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """Returns (tokens, transport) -> milliseconds; the median where a case was measured several times."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        if (match := _MEASURED.fullmatch(row["name"])) and row["unit"] == "ms":
            found.setdefault((int(match[1]), match[2]), []).append(float(row["value"]))
    return {case: statistics.median(values) for case, values in found.items()}

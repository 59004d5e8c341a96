"""The whole model in one process: transformers' own continuous batching, in a closed loop of texts.

Arguments: the model's directory, the experts implementation. Threads are set from outside. One JSON line orders a run:
{"prompts": [[id, ...], ...], "new_tokens": n, "concurrency": c}; its answer: {"seconds", "first_s", "between_s"}.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

CACHED_TOKENS = 2**14
PAGE_TOKENS = 32
BATCH_TOKENS = 512


class Texts:
    """A manager, kept from run to run."""

    def __init__(self, directory: str, implementation: str, concurrency: int) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, experts_implementation=implementation
        )
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1),
            ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=CACHED_TOKENS // PAGE_TOKENS,
                max_batch_tokens=BATCH_TOKENS,
                max_requests_per_batch=concurrency,
                allow_block_sharing=True,
            ),
        )
        self._manager.start()

    def run(self, prompts: list[list[int]], new_tokens: int, concurrency: int) -> dict[str, Any]:
        """As many texts at a time; a text's end begins the next."""
        waiting = list(reversed(prompts))
        began_s: dict[str, float] = {}
        last_s: dict[str, float] = {}
        first, between = [], []
        start_s = time.perf_counter()

        def begin() -> None:
            name = f"r{len(waiting)}-{start_s}"
            began_s[name] = time.perf_counter()
            self._manager.add_request(waiting.pop(), request_id=name, max_new_tokens=new_tokens, streaming=True)

        for _ in range(min(concurrency, len(prompts))):
            begin()
        ended = 0
        while ended < len(prompts):
            output = self._manager.get_result(timeout=60.0)
            assert output is not None and output.error is None, output
            now_s = time.perf_counter()
            if output.request_id in last_s:
                between.append(now_s - last_s[output.request_id])
            else:
                first.append(now_s - began_s[output.request_id])
            last_s[output.request_id] = now_s
            if output.is_finished():
                ended += 1
                if waiting:
                    begin()
        return {"seconds": time.perf_counter() - start_s, "first_s": first, "between_s": between}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not look like an answer
    directory, implementation, concurrency = sys.argv[1], sys.argv[2], int(sys.argv[3])
    texts = Texts(directory, implementation, concurrency)
    for line in sys.stdin:
        answers.write(json.dumps(texts.run(**json.loads(line))) + "\n")
    os._exit(0)  # its thread is not a daemon


if __name__ == "__main__":
    main()

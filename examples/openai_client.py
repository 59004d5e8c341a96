"""Streams a completion from `moecluster serve` with the openai package, which works unchanged.

    moecluster serve CHECKPOINT
    python examples/openai_client.py "import os"

Needs `pip install openai`. The API key is read from $OPENAI_API_KEY; a gateway without API keys takes any.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import openai


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Stream a completion from an OpenAI-compatible service.")
    parser.add_argument("prompt")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args(arguments)
    key = os.environ.get("OPENAI_API_KEY", "none")
    with openai.OpenAI(base_url=given.base_url, api_key=key) as client:
        model = client.models.list().data[0].id
        stream = client.completions.create(
            model=model,
            prompt=given.prompt,
            max_tokens=given.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.text, end="", flush=True)
            if chunk.usage is not None:
                print(f"\n{model}: {chunk.usage.completion_tokens} tokens after {chunk.usage.prompt_tokens}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

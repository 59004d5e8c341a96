"""Streams a completion from the routers of a cluster with the Python client, over gRPC, without the HTTP gateway.

    moecluster up CHECKPOINT
    python examples/stream.py "def main(" --router 127.0.0.1:PORT

`moecluster up` prints the address of every router. Give --router once for each of them: if the router that generates a
request dies, the request continues at another one.
"""

import argparse
import sys
from collections.abc import Sequence

from moecluster.client import Client, local_credentials
from moecluster.errors import MoeClusterError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Stream a completion from the routers of a cluster.")
    parser.add_argument("prompt")
    parser.add_argument("--router", action="append", required=True, metavar="HOST:PORT")
    parser.add_argument("--cluster", default="moecluster", help="name of the cluster, which `up` started on this host")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        with Client(given.router, credentials=local_credentials(given.cluster)) as client:
            stream = client.generate(
                given.prompt,
                max_new_tokens=given.max_new_tokens,
                temperature=given.temperature,
                seed=given.seed,
            )
            for chunk in stream:
                print(chunk.text, end="", flush=True)
    except MoeClusterError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{len(stream.ids)} tokens after a prompt of {stream.prompt_tokens}: {stream.finish_reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The Python clients of a cluster.

with Client("127.0.0.1:50051", credentials=local_credentials("moecluster")) as client:
    for chunk in client.generate("def main(", max_new_tokens=64):
        print(chunk.text, end="", flush=True)

async with AsyncClient(["10.0.0.1:50051", "10.0.0.2:50051"], secret_file="moecluster.secret") as client:
    print(await client.chat([{"role": "user", "content": "Who are you?"}], temperature=0.7, seed=1).text())

Routers require the secret of their cluster. `local_credentials` reads it for a cluster that this user has started on
this host; elsewhere pass a copy of its file as `secret_file`, or name it in $MOECLUSTER_SECRET_FILE.

With several routers of a cluster, a request whose router is lost continues at another one, exactly where it stopped.
"""

from moecluster.client.aio import AsyncClient, AsyncGenerationStream
from moecluster.client.requests import GenerationOptions
from moecluster.client.sync import Client, GenerationStream
from moecluster.rpc.credentials import ClusterCredentials, local_credentials

__all__ = [
    "AsyncClient",
    "AsyncGenerationStream",
    "Client",
    "ClusterCredentials",
    "GenerationOptions",
    "GenerationStream",
    "local_credentials",
]

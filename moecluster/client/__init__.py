"""What a user imports to reach a cluster.

with Client("127.0.0.1:50051", credentials=local_credentials("moecluster")) as client:
    for piece in client.generate("def main(", max_new_tokens=64):
        print(piece.text, end="", flush=True)

async with AsyncClient(["10.0.0.1:50051", "10.0.0.2:50051"], secret_file="moecluster.secret") as client:
    print(await client.chat([{"role": "user", "content": "Who are you?"}], temperature=0.7, seed=1).text())

Routers ask for the secret of their cluster: `local_credentials` reads that of one that this user has brought up on this
host; elsewhere give a copy of its file as `secret_file`, or name it in $MOECLUSTER_SECRET_FILE.

Given several routers of a cluster, a text whose router is lost goes on at another one, exactly where it broke off.
"""

from moecluster.client.aio import AsyncClient, AsyncGenerationStream
from moecluster.client.requests import TextOptions
from moecluster.client.sync import Client, GenerationStream
from moecluster.rpc.credentials import ClusterCredentials, local_credentials

__all__ = [
    "AsyncClient",
    "AsyncGenerationStream",
    "Client",
    "ClusterCredentials",
    "GenerationStream",
    "TextOptions",
    "local_credentials",
]

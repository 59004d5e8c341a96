"""What a user imports to reach a cluster.

with Client("127.0.0.1:50051") as client:
    for piece in client.generate("def main(", max_new_tokens=64):
        print(piece.text, end="", flush=True)

async with AsyncClient(["10.0.0.1:50051", "10.0.0.2:50051"]) as client:
    print(await client.chat([{"role": "user", "content": "Who are you?"}], temperature=0.7, seed=1).text())

Given several routers of a cluster, a text whose router is lost goes on at another one, exactly where it broke off.
"""

from moecluster.client.asynchronous import AsyncClient, AsyncGenerationStream
from moecluster.client.requests import TextOptions
from moecluster.client.sync import Client, GenerationStream

__all__ = ["AsyncClient", "AsyncGenerationStream", "Client", "GenerationStream", "TextOptions"]

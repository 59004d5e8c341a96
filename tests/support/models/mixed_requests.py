"""32 greedy requests of different lengths: generated together through a router, and each alone by the whole model."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import torch
from transformers import PreTrainedModel

from moecluster.generation import GenerationRequest
from moecluster.hf.trial import without_generation_settings
from moecluster.models.tokenizer.byte_level import build_byte_tokenizer
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.router.engine.engine import EngineLimits
from moecluster.router.router import Router
from moecluster.rpc.router.messages import decode_chunk, encode_generation_request
from moecluster.rpc.router.server import serve_router
from moecluster.rpc.server import open_channel
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.clusters.given import any_directory
from tests.support.models.families import VOCABULARY, make_model, save
from tests.support.models.near_ties import is_near_tie

NUM_REQUESTS = 32
MAX_PROMPT = 40
MAX_NEW = 12
END_IDS = tuple(range(2, 24))  # enough that about every sixth token is one
LIMITS = EngineLimits(max_running=NUM_REQUESTS, max_cached_tokens=4096, max_batch_tokens=96)  # prompts come in parts


def assert_outputs_of_the_whole_model(family: str, directory: Path, *, seed: int, device: str = "cpu") -> None:
    """Saves a small model of the family, serves it with the trunk on device, and compares each output with the one that
    the whole model generates on the CPU."""
    model = make_model(family)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = list(END_IDS)
    save(model, directory, "per-expert")
    build_byte_tokenizer().save_pretrained(directory)
    requests = make_requests(seed)
    with torch.no_grad():
        expected = [written_alone(model, request) for request in requests]
    texts = written_together(directory, requests, device)
    for request, ours, theirs in zip(requests, texts, expected, strict=True):
        assert_same(model, request, ours, theirs)


def make_requests(seed: int) -> list[GenerationRequest]:
    choose = random.Random(seed)
    return [
        GenerationRequest(
            request_id=f"r{i}",
            prompt_ids=tuple(choose.randrange(3, VOCABULARY) for _ in range(choose.randrange(1, MAX_PROMPT))),
            max_new_tokens=choose.randrange(2, MAX_NEW),
            ignore_eos=i % 2 == 1,
        )
        for i in range(NUM_REQUESTS)
    ]


def written_alone(model: Any, request: GenerationRequest) -> list[int]:
    """model: with transformers' GenerationMixin."""
    ids = torch.tensor([request.prompt_ids])
    bare: Any = without_generation_settings(model)
    out = bare.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=None if request.ignore_eos else list(END_IDS),
        pad_token_id=0,
    )
    return [int(i) for i in out[0, ids.shape[1] :]]


def written_together(directory: Path, requests: Sequence[GenerationRequest], device: str) -> list[list[int]]:
    with ExpertCluster(directory, transport="shm") as cluster:
        router = Router(
            directory,
            cluster.remote,
            is_given=any_directory,
            limits=LIMITS,
            device=device,
        )
        server = serve_router(router, credentials=None)
        try:
            with open_channel(server.address) as channel, ThreadPoolExecutor(len(requests)) as clients:
                return list(clients.map(partial(write, channel), requests))
        finally:
            server.stop(0.0)
            router.close()


def write(channel: grpc.Channel, request: GenerationRequest) -> list[int]:
    chunks = [decode_chunk(m) for m in RouterServiceStub(channel).Generate(encode_generation_request(request))]
    assert chunks[-1].prompt_tokens == len(request.prompt_ids)
    ids = [i for chunk in chunks for i in chunk.ids]
    ended = ids[-1] in END_IDS and not request.ignore_eos
    assert chunks[-1].finish_reason == ("stop" if ended else "length")
    return ids


def assert_same(model: PreTrainedModel, request: GenerationRequest, ours: Sequence[int], theirs: Sequence[int]) -> None:
    assert ours == theirs or is_near_tie(model, request.prompt_ids, ours, theirs), (request, ours, theirs)

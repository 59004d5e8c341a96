"""Unloads while an actor serves: they drain queued batches and return the memory."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from moecluster.config.sections import ModelConfig
from moecluster.errors import NotHosted, StaleRequest
from moecluster.expert.service import ExpertService
from moecluster.models.native.build import build_model
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import ExpertId
from tests.support.clusters.given import any_directory
from tests.support.expert.batches import make_batch
from tests.support.expert.small_actor import (
    EXPERTS,
    TIMEOUT_S,
    Occupied,
    ask,
    batch_of,
    check_rows,
    submit,
    wait_for_rows,
)
from tests.support.waiting import wait_until


def test_an_unload_waits_for_what_is_queued(service: ExpertService, modules: dict[int, nn.Module]) -> None:
    service.set_placement(PlacementNotice(term=1, generation=6))
    with ThreadPoolExecutor(1) as threads:
        with Occupied(service):
            waits = submit(service, batch_of(3))
            unload = threads.submit(service.unload, term=1, experts=EXPERTS[:1], drain_timeout_s=TIMEOUT_S)
            time.sleep(0.05)
            assert not unload.done() and service.status().experts == EXPERTS
        check_rows(modules, batch_of(3), waits.result(TIMEOUT_S))
        unload.result(TIMEOUT_S)
    assert service.status().experts == EXPERTS[1:]
    with pytest.raises(NotHosted) as caught:
        ask(service, batch_of())
    assert caught.value.placement == (1, 6)


def test_an_unload_waits_no_longer_than_it_may(service: ExpertService) -> None:
    with Occupied(service):
        waits = submit(service, batch_of())
        service.unload(term=1, experts=EXPERTS[:1], drain_timeout_s=0.05)
        assert service.status().experts == EXPERTS[1:]
    with pytest.raises(NotHosted):
        waits.result(TIMEOUT_S)


def test_an_unload_does_not_wait_for_batches_of_other_experts(service: ExpertService) -> None:
    with Occupied(service):
        submit(service, batch_of())  # of experts 0 and 2
        wait_for_rows(service, 2)
        begun_s = time.monotonic()
        service.unload(term=1, experts=[EXPERTS[1], EXPERTS[3]], drain_timeout_s=TIMEOUT_S)
        assert time.monotonic() - begun_s < TIMEOUT_S / 2
    assert service.status().experts == (EXPERTS[0], EXPERTS[2])


def test_a_load_that_is_ordered_while_an_unload_drains_keeps_its_experts(
    service: ExpertService, checkpoint: Path
) -> None:
    with ThreadPoolExecutor(1) as threads:
        with Occupied(service):
            unload = threads.submit(service.unload, term=1, experts=EXPERTS[:3], drain_timeout_s=TIMEOUT_S)
            wait_until(lambda: service.fence.unloads_under_way, "the unload")
            assert service.load(LoadRequest(term=1, experts=EXPERTS[1:2], checkpoint=str(checkpoint))) == 0
        unload.result(TIMEOUT_S)
    assert service.status().experts == (EXPERTS[1], EXPERTS[3])


def test_an_unload_of_a_controller_that_is_over_drops_nothing(service: ExpertService) -> None:
    with ThreadPoolExecutor(1) as threads, Occupied(service):
        unload = threads.submit(service.unload, term=1, experts=EXPERTS[:1], drain_timeout_s=TIMEOUT_S)
        wait_until(lambda: service.fence.unloads_under_way, "the unload")
        service.set_placement(PlacementNotice(term=2, generation=1))
        with pytest.raises(StaleRequest, match="controller term 1 is superseded"):
            unload.result(TIMEOUT_S)
        assert service.status().experts == EXPERTS


WIDE = ModelConfig(
    hidden_size=512, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=8, expert_inner_size=2048, max_positions=64
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_unloaded_experts_goes_back(tmp_path: Path, dtype: str) -> None:
    build_model(WIDE, seed=0).save_pretrained(tmp_path)
    experts = tuple(ExpertId(layer=0, index=index) for index in range(WIDE.num_experts))
    process = psutil.Process()
    # Packed by the loading thread. If another thread packs, memory is returned only in an actor process, whose threads
    # share one malloc arena (actors/settings.py).
    with closing(ExpertService(is_given=any_directory, name="expert-0", batch_invariant=True)) as service:

        def load() -> int:
            return service.load(LoadRequest(term=1, experts=experts, checkpoint=str(tmp_path), dtype=dtype))

        def compute() -> None:
            rows = torch.float32 if dtype == "float32" else torch.bfloat16
            ask(service, make_batch({0: [0, 1], 5: [0]}, rows=2, width=WIDE.hidden_size, layer=0, dtype=rows))

        load()  # so that first-use caches are not counted as expert memory
        compute()
        service.unload(term=1, experts=experts)
        before_bytes = process.memory_info().rss
        hosted_bytes = load()
        compute()
        held_bytes = process.memory_info().rss - before_bytes
        service.unload(term=1, experts=experts)
        left_bytes = process.memory_info().rss - before_bytes
    assert hosted_bytes >= 8 * 3 * 512 * 2048 * 2
    assert 0.9 * hosted_bytes < held_bytes < 1.3 * hosted_bytes
    assert left_bytes < 0.1 * hosted_bytes

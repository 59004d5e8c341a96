"""The expert service in one process: merging, limits, refusals, and a controller's requests."""

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from moecluster.errors import (
    CheckpointError,
    DeadlineExceeded,
    Exhausted,
    InvalidMessage,
    MoeClusterError,
    NotHosted,
    StaleRequest,
    Unavailable,
)
from moecluster.expert import compute
from moecluster.expert.service import ExpertService
from moecluster.metrics import Metrics
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import ComputeBatch, ComputeResult, ExpertId
from tests.support.clusters.given import any_directory
from tests.support.expert.batches import assert_same_fields, make_batch
from tests.support.expert.small_actor import (
    EXPERTS,
    LAYER,
    TIMEOUT_S,
    WIDTH,
    Occupied,
    ask,
    batch_of,
    check_rows,
    serving,
    submit,
)


def test_rows_are_computed_by_the_checkpoint_s_experts(service: ExpertService, modules: dict[int, nn.Module]) -> None:
    for seed, rows in enumerate((1, 2, 30)):
        batch = batch_of(rows, seed=seed)
        check_rows(modules, batch, ask(service, batch))


def test_what_waits_for_one_layer_is_computed_at_once(
    service: ExpertService, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[int] = []
    really_forward = compute.forward

    def watched(
        experts: dict[int, nn.Module], batches: Sequence[ComputeBatch], run: compute.RunExpert
    ) -> list[ComputeResult]:
        merged.append(len(batches))
        return really_forward(experts, batches, run)

    monkeypatch.setattr(compute, "forward", watched)
    # Equal request ids: routers number their messages independently.
    batches = [batch_of(rows, seed=rows, request_id=1) for rows in (1, 2, 3, 4)]
    with Occupied(service):
        futures = [submit(service, batch) for batch in batches]
    for batch, future in zip(batches, futures, strict=True):
        check_rows(modules, batch, future.result(TIMEOUT_S))
    assert merged == [1, 4]


def test_an_expired_batch_is_answered_so_and_its_company_is_computed(
    service: ExpertService, modules: dict[int, nn.Module]
) -> None:
    late, fresh = batch_of(seed=1, deadline_s=0.01, request_id=1), batch_of(seed=1, request_id=1)
    with Occupied(service):
        futures = [submit(service, late), submit(service, fresh)]
        time.sleep(0.03)
    with pytest.raises(DeadlineExceeded, match="waited longer than its deadline"):
        futures[0].result(TIMEOUT_S)
    check_rows(modules, fresh, futures[1].result(TIMEOUT_S))


def test_one_of_merged_batches_that_asks_for_what_is_not_here_fails_alone(
    service: ExpertService, modules: dict[int, nn.Module]
) -> None:
    good = batch_of(seed=1)
    bad = make_batch({1: [0], 9: [0]}, rows=1, width=WIDTH, layer=LAYER)
    with Occupied(service):
        futures = [submit(service, bad), submit(service, good)]
    with pytest.raises(NotHosted):
        futures[0].result(TIMEOUT_S)
    check_rows(modules, good, futures[1].result(TIMEOUT_S))


def test_a_full_queue_is_backpressure_and_ends_with_it(checkpoint: Path, modules: dict[int, nn.Module]) -> None:
    with serving(checkpoint, max_queue_bytes=3 * WIDTH * 4) as service:
        batch = batch_of(2)
        with Occupied(service):
            waits = submit(service, batch)
            refused = submit(service, batch)
            with pytest.raises(Exhausted, match="256 bytes wait, at most 384"):
                refused.result(0)  # at once
        check_rows(modules, batch, waits.result(TIMEOUT_S))
        check_rows(modules, batch, ask(service, batch))


def test_what_is_not_hosted_is_said_with_the_placement_that_stands(service: ExpertService) -> None:
    service.set_placement(PlacementNotice(term=3, generation=8))
    service.unload(term=3, experts=EXPERTS[2:])
    with pytest.raises(NotHosted, match=r"experts \[2\] of layer 1 are not here") as caught:
        ask(service, batch_of())
    assert caught.value.placement == (3, 8)
    with pytest.raises(NotHosted, match="of layer 0 are not here"):
        ask(service, make_batch({0: [0]}, rows=1, width=WIDTH, layer=0))


@pytest.mark.parametrize(
    ("batch", "field"),
    [
        (batch_of(dtype=torch.bfloat16), r"x\.dtype: torch\.bfloat16, and the experts are torch\.float32"),
        (make_batch({0: [0]}, rows=1, width=WIDTH - 1, layer=LAYER), r"x\.shape: rows of 31, and the experts take 32"),
        (make_batch({0: [0]}, rows=1, width=WIDTH + 1, layer=LAYER), r"x\.shape: rows of 33, and the experts take 32"),
    ],
)
def test_rows_that_the_experts_cannot_take_are_refused_by_name(
    service: ExpertService, modules: dict[int, nn.Module], batch: ComputeBatch, field: str
) -> None:
    with pytest.raises(InvalidMessage, match=field):
        ask(service, batch)
    check_rows(modules, batch_of(), ask(service, batch_of()))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("odd rows"), AssertionError()])
def test_an_expert_that_raises_ends_its_batch_and_not_the_actor(
    service: ExpertService, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def raising(*args: object) -> list[ComputeResult]:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(compute, "forward", raising)
        with pytest.raises(MoeClusterError, match=f"the computation failed: {error}"):
            ask(service, batch_of())
    check_rows(modules, batch_of(), ask(service, batch_of()))


def test_an_ended_actor_computes_what_waits_and_then_answers_unavailable(
    checkpoint: Path, modules: dict[int, nn.Module]
) -> None:
    with serving(checkpoint) as service, Occupied(service):
        waits = submit(service, batch_of())
    check_rows(modules, batch_of(), waits.result(TIMEOUT_S))
    with pytest.raises(Unavailable):
        submit(service, batch_of()).result(0)


def test_batch_invariant_pairs_do_not_depend_on_company(checkpoint: Path) -> None:
    with serving(checkpoint, batch_invariant=True) as service:
        batch = batch_of(3, unsummed=True)
        alone = ask(service, batch)
        assert alone.y_ND is None and alone.y_PD is not None and alone.y_PD.shape == (4, WIDTH)
        with Occupied(service):
            futures = [submit(service, batch_of(rows, seed=rows, unsummed=True)) for rows in (70, 5)]
            among_others = submit(service, batch)
        assert_same_fields(among_others.result(TIMEOUT_S), alone)
        assert all(future.result(TIMEOUT_S).y_PD is not None for future in futures)


def test_computed_pairs_are_counted(checkpoint: Path) -> None:
    metrics = Metrics(model="m")
    with serving(checkpoint, "expert-7", metrics=metrics) as service:
        for _ in range(2):
            ask(service, batch_of(4))
    assert 'moecluster_actor_tokens_total{actor="expert-7",cluster="",model="m"} 10.0' in metrics.render()
    assert 'moecluster_actor_queue_rows{actor="expert-7",cluster="",model="m"} 0.0' in metrics.render()


# -- requests of the controller --


def test_orders_of_an_older_controller_are_refused(service: ExpertService, checkpoint: Path) -> None:
    service.set_placement(PlacementNotice(term=5, generation=2, checkpoint="c"))
    for order in (
        lambda: service.load(LoadRequest(term=4, experts=EXPERTS, checkpoint=str(checkpoint))),
        lambda: service.unload(term=4, experts=EXPERTS),
        lambda: service.set_placement(PlacementNotice(term=4, generation=9)),
    ):
        with pytest.raises(StaleRequest, match="controller term 4 is superseded by term 5"):
            order()
    status = service.status()
    assert (status.placement, status.checkpoint, status.experts) == ((5, 2), "c", EXPERTS)
    service.set_placement(PlacementNotice(term=5, generation=1, checkpoint="older"))  # delayed and outdated
    assert (service.status().placement, service.status().checkpoint) == ((5, 2), "c")
    service.set_placement(PlacementNotice(term=6, generation=1, checkpoint="d"))
    assert (service.status().placement, service.status().checkpoint) == ((6, 1), "d")


def test_loading_again_changes_nothing_unless_told_to(service: ExpertService, checkpoint: Path) -> None:
    held = service.status().hosted_bytes
    assert held == 4 * 3 * 32 * 24 * 4  # experts x matrices x D x F x float32
    assert service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint))) == 0
    assert service.load(LoadRequest(term=1, experts=EXPERTS[:1], checkpoint=str(checkpoint), replace=True)) == held // 4
    service.unload(term=1, experts=[*EXPERTS[:2], ExpertId(layer=9, index=9)])  # unknown ones are ignored
    assert service.status().experts == EXPERTS[2:]
    assert service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint))) == held // 2
    assert service.status().hosted_bytes == held


def test_experts_are_served_in_the_dtype_that_was_asked_for(checkpoint: Path) -> None:
    with closing(ExpertService(is_given=any_directory, name="expert-0")) as service:
        service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), dtype="bfloat16"))
        result = ask(service, batch_of(dtype=torch.bfloat16))
        assert result.y_ND is not None and result.y_ND.dtype == torch.bfloat16
        with pytest.raises(InvalidMessage, match=r"x\.dtype"):
            ask(service, batch_of())


def test_only_the_served_weight_version_answers(service: ExpertService, checkpoint: Path) -> None:
    service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), weight_version=3, replace=True))
    assert service.status().weight_version == 3
    for version in (0, 3):
        assert ask(service, batch_of(weight_version=version)).y_ND is not None
    with pytest.raises(StaleRequest, match="weight version 2 is not served any more: 3 is"):
        ask(service, batch_of(weight_version=2))


def test_what_cannot_be_loaded_is_said_and_leaves_the_rest(service: ExpertService, checkpoint: Path) -> None:
    nowhere = str(checkpoint / "nowhere")
    unknown = (ExpertId(layer=LAYER, index=4), ExpertId(layer=0, index=0))
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=nowhere))
    with pytest.raises(InvalidMessage, match=r"the model has no 1/4, 0/0 \(layer/index\)"):
        service.load(LoadRequest(term=1, experts=unknown, checkpoint=str(checkpoint)))
    with pytest.raises(InvalidMessage, match="dtype: 'float8' is none of float32, bfloat16, float16"):
        service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), dtype="float8", replace=True))
    with pytest.raises(DeadlineExceeded, match="1/0: not loaded within"):
        service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), replace=True, timeout_s=1e-9))
    assert service.status().experts == EXPERTS

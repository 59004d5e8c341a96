"""Remote experts from a trunk's point of view, with actors in this process: gradients, counts, retries, refusals."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed

from moecluster.dispatch.load_counts import LoadCounts
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import StateLost, UserError
from moecluster.metrics import Metrics
from moecluster.types import MessageKey
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.expert.small_actor import (
    EXPERTS,
    LAYER,
    SGD,
    TAG,
    TIMEOUT_S,
    WIDTH,
)
from tests.support.expert.small_layer import HALVES, TOKENS, check_served, dense, tokens


@pytest.fixture
def serving(checkpoint: Path) -> Iterator[ExpertCluster]:
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster:
        yield cluster


@pytest.fixture
def training(checkpoint: Path) -> Iterator[ExpertCluster]:
    with ExpertCluster(checkpoint, replicas=HALVES, optimizer=SGD) as cluster:
        yield cluster


def square_norm(modules: dict[int, nn.Module]) -> float:
    grads = [p.grad for module in modules.values() for p in module.parameters() if p.grad is not None]
    return sum(float(grad.double().square().sum()) for grad in grads)


def reduced_square_norm(cluster: ExpertCluster) -> float:
    sent = cluster.remote.sent(TAG)
    return sum(control.reduce(TAG, sent.get(name, [])).square_norm for name, control in cluster.pool.controls().items())


# -- forward and backward --


def test_a_layer_s_output_equals_the_dense_sum(serving: ExpertCluster, modules: dict[int, nn.Module]) -> None:
    for seed in range(3):
        check_served(serving.remote, modules, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_may_have_another_dtype_than_rows(
    serving: ExpertCluster, modules: dict[int, nn.Module], dtype: torch.dtype
) -> None:
    x_TD, ids_TK, weights_TK = tokens()
    with torch.no_grad():
        y_TD = serving.remote(LAYER, x_TD, ids_TK.int(), weights_TK.to(dtype))
        expected_TD = dense(modules, x_TD, ids_TK, weights_TK.to(dtype).float())
    assert y_TD.dtype == torch.float32
    torch.testing.assert_close(y_TD, expected_TD, atol=5e-6, rtol=0)


def test_gradients_equal_autograd(training: ExpertCluster, modules: dict[int, nn.Module]) -> None:
    x_TD, ids_TK, weights_TK = tokens()
    grad_TD = tokens(seed=9)[0]
    leaves = [[x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()] for _ in range(2)]
    with training.remote.training(TAG):
        training.remote(LAYER, leaves[0][0], ids_TK, leaves[0][1]).backward(grad_TD)
    dense(modules, leaves[1][0], ids_TK, leaves[1][1]).backward(grad_TD)
    for ours, theirs in zip(*leaves, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=0)
    assert reduced_square_norm(training) == pytest.approx(square_norm(modules), rel=1e-5)


def test_experts_are_trained_under_a_frozen_trunk(training: ExpertCluster, modules: dict[int, nn.Module]) -> None:
    """Nothing upstream requires a gradient, and still a graph is recorded."""
    batch = tokens()
    with training.remote.training(TAG):
        y_TD = training.remote(LAYER, *batch)
        assert y_TD.requires_grad
        y_TD.sum().backward()
    dense(modules, *batch).sum().backward()
    assert reduced_square_norm(training) == pytest.approx(square_norm(modules), rel=1e-5) and square_norm(modules) > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_every_gradient_once(
    training: ExpertCluster, modules: dict[int, nn.Module], reentrant: bool
) -> None:
    """Gradient checkpointing repeats forward calls in backward."""
    x_TD, ids_TK, weights_TK = tokens()
    x_TD.requires_grad_()
    with training.remote.training(TAG):
        y_TD = checkpointed(training.remote, LAYER, x_TD, ids_TK, weights_TK, use_reentrant=reentrant)
        y_TD.sum().backward()
    dense(modules, x_TD, ids_TK, weights_TK).sum().backward()
    assert reduced_square_norm(training) == pytest.approx(square_norm(modules), rel=1e-5)


def test_a_layer_called_twice_in_a_micro_batch_sends_two_messages(
    training: ExpertCluster, modules: dict[int, nn.Module]
) -> None:
    first, second = tokens(seed=1), tokens(seed=2)
    with training.remote.training(TAG, rank=0, micro_batch=0):
        (training.remote(LAYER, *first).sum() + 2 * training.remote(LAYER, *second).sum()).backward()
    (dense(modules, *first).sum() + 2 * dense(modules, *second).sum()).backward()
    for keys in training.remote.sent(TAG).values():
        assert sorted(key.pass_index for key in keys) == [0, 1]
    assert reduced_square_norm(training) == pytest.approx(square_norm(modules), rel=1e-5)


def test_what_was_sent_is_known_until_it_is_forgotten(training: ExpertCluster) -> None:
    x_TD, _, weights_TK = tokens()
    ids_TK = torch.zeros(TOKENS, 1, dtype=torch.int64)  # all to the first actor
    with training.remote.training(TAG, rank=0, micro_batch=3):
        training.remote(LAYER, x_TD, ids_TK, weights_TK[:, :1].contiguous()).sum().backward()
    key = MessageKey(rank=0, micro_batch=3, layer=LAYER, pass_index=0, rows=TOKENS)
    assert training.remote.sent(TAG) == {"expert-0": [key]}
    assert training.remote.sent(replace(TAG, attempt=1)) == {}
    training.remote.forget(replace(TAG, step=0))
    assert training.remote.sent(TAG) == {"expert-0": [key]}
    training.remote.forget(replace(TAG, attempt=2))
    assert training.remote.sent(TAG) == {}


def test_a_batch_whose_assignments_are_all_dropped_gives_zeros(training: ExpertCluster) -> None:
    x_TD, ids_TK, weights_TK = tokens(dropped=2.0)
    x_TD.requires_grad_()
    with torch.no_grad():
        assert torch.equal(training.remote(LAYER, x_TD, ids_TK, weights_TK), torch.zeros(TOKENS, WIDTH))
    with training.remote.training(TAG):
        y_TD = training.remote(LAYER, x_TD, ids_TK, weights_TK)
        y_TD.sum().backward()
    assert torch.equal(y_TD, torch.zeros(TOKENS, WIDTH))
    assert x_TD.grad is not None and torch.equal(x_TD.grad, torch.zeros(TOKENS, WIDTH))
    assert training.remote.sent(TAG) == {} and reduced_square_norm(training) == 0.0


def test_gradients_outside_of_a_step_are_refused_instead_of_lost(serving: ExpertCluster) -> None:
    x_TD, ids_TK, weights_TK = tokens()
    for rows, weights in (
        (x_TD.clone().requires_grad_(), weights_TK),
        (x_TD, weights_TK.clone().requires_grad_()),
    ):
        with pytest.raises(UserError, match=r"outside of a training step.*RemoteExperts\.training"):
            serving.remote(LAYER, rows, ids_TK, weights)
    assert not serving.remote(LAYER, x_TD, ids_TK, weights_TK).requires_grad


def test_without_gradients_a_call_inside_a_step_is_plain_serving(
    training: ExpertCluster, modules: dict[int, nn.Module]
) -> None:
    with training.remote.training(TAG):
        check_served(training.remote, modules)
    assert training.remote.sent(TAG) == {}


def test_training_on_actors_that_only_serve_says_that_the_state_is_lost(serving: ExpertCluster) -> None:
    with serving.remote.training(TAG), pytest.raises(StateLost, match="expert-0 trains nothing"):
        serving.remote(LAYER, *tokens())


def test_another_thread_is_outside_of_the_step_unless_it_inherits_the_context(
    training: ExpertCluster, modules: dict[int, nn.Module]
) -> None:
    """Like autograd's threads for other devices: a layer computed there is refused instead of left untrained."""
    x_TD, ids_TK, weights_TK = tokens()

    def train() -> None:
        training.remote(LAYER, x_TD.clone().requires_grad_(), ids_TK, weights_TK).sum().backward()

    with ThreadPoolExecutor(1) as other, training.remote.training(TAG):
        with pytest.raises(UserError, match="outside of a training step"):
            other.submit(train).result(TIMEOUT_S)
        assert training.remote.sent(TAG) == {}
        other.submit(copy_context().run, train).result(TIMEOUT_S)
        train()
    for keys in training.remote.sent(TAG).values():
        assert sorted(key.pass_index for key in keys) == [0, 1], "both threads number the passes of one micro-batch"
    for _ in range(2):
        dense(modules, x_TD, ids_TK, weights_TK).sum().backward()
    assert reduced_square_norm(training) == pytest.approx(square_norm(modules), rel=1e-5)


# -- counts --


def test_assignments_are_counted_by_expert(serving: ExpertCluster) -> None:
    _, ids_TK, _ = batch = tokens()
    expected_E = [int((ids_TK == index).sum()) for index in range(len(EXPERTS))]
    with torch.no_grad():
        serving.remote(LAYER, *batch)
        with serving.remote.counting() as outer:
            serving.remote(LAYER, *batch)
            with serving.remote.counting() as inner:
                serving.remote(LAYER, *batch)
    assert inner.snapshot()[LAYER].tolist() == expected_E
    assert outer.snapshot()[LAYER].tolist() == [2 * count for count in expected_E]
    assert serving.remote.loads.snapshot()[LAYER].tolist() == [3 * count for count in expected_E]


def test_counts_of_other_threads_are_not_mixed_in(serving: ExpertCluster) -> None:
    batch = tokens()

    @torch.no_grad()
    def call() -> None:
        serving.remote(LAYER, *batch)

    with serving.remote.counting() as counts, ThreadPoolExecutor(1) as other:
        other.submit(call).result(TIMEOUT_S)
        assert dict(counts.snapshot()) == {}
    assert serving.remote.loads.snapshot()[LAYER].sum() > 0


def test_a_snapshot_does_not_change_afterwards() -> None:
    counts, one_E = LoadCounts(), np.array([1, 2])
    counts.add(0, one_E)
    before = counts.snapshot()
    counts.add(0, one_E)
    one_E[:] = 100
    assert before[0].tolist() == [1, 2] and counts.snapshot()[0].tolist() == [2, 4]


def test_rows_of_padding_count_as_nothing(checkpoint: Path) -> None:
    metrics = Metrics(model="m")
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster:
        remote = RemoteExperts(cluster.pool, metrics=metrics)
        x_TD, ids_TK, weights_TK = tokens(dropped=0.0)
        ids_TK[5:] = len(EXPERTS) + 1
        with torch.no_grad():
            y_TD = remote(LAYER, x_TD, ids_TK, weights_TK)
    assert not y_TD[5:].any() and y_TD[:5].any()
    assert "dropped_assignments_total{" not in metrics.render()
    assert remote.loads.snapshot()[LAYER].sum() == ids_TK[:5].numel()


def test_metrics_name_dropped_assignments_and_bytes(checkpoint: Path) -> None:
    metrics = Metrics(model="m")
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster:
        remote = RemoteExperts(cluster.pool, metrics=metrics)
        x_TD, ids_TK, weights_TK = tokens()
        with torch.no_grad():
            remote(LAYER, x_TD, ids_TK, weights_TK)
    dropped = int((ids_TK == len(EXPERTS)).sum())
    rows = sum(bool(((row >= 2 * actor) & (row < 2 * actor + 2)).any()) for row in ids_TK for actor in (0, 1))
    text = metrics.render()
    assert dropped > 0 and f'dropped_assignments_total{{cluster="",layer="{LAYER}",model="m"}} {dropped}.0' in text
    size = f"{rows * WIDTH * 4}.0"
    assert f'dispatch_bytes_total{{cluster="",direction="sent",model="m",transport="in-process"}} {size}' in text
    assert f'dispatch_bytes_total{{cluster="",direction="received",model="m",transport="in-process"}} {size}' in text

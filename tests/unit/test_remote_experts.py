"""Remote experts as a trunk sees them, with actors in this process: gradients, counts, retries and refusals."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed

from moecluster.errors import AttemptAborted, DeadlineExceeded, StateLost, UserError
from moecluster.metrics import Metrics
from moecluster.roles.expert_pool import ExpertPool, FixedPlacement
from moecluster.roles.load_counts import LoadCounts
from moecluster.roles.remote_experts import RemoteExperts
from moecluster.rpc.in_process import InProcessTransport
from moecluster.types import ActorAddress, MessageKey, Placement, Replica
from tests.expert_cluster import ExpertCluster
from tests.small_actor import (
    EXPERTS,
    LAYER,
    SGD,
    TAG,
    TIMEOUT_S,
    WIDTH,
    Occupied,
    batch_of,
    load_modules,
    save_small_model,
    submit,
    wait_for_rows,
)
from tests.small_actor import serving as serve

TOKENS, TOP_K = 12, 2
HALVES = tuple(Replica(expert=expert, actor=f"expert-{expert.index // 2}") for expert in EXPERTS)
TWICE = tuple(Replica(expert=expert, actor=f"expert-{i}", share=0.5) for expert in EXPERTS for i in range(2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def modules(checkpoint: Path) -> dict[int, nn.Module]:
    return load_modules(checkpoint)


@pytest.fixture
def serving(checkpoint: Path) -> Iterator[ExpertCluster]:
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster:
        yield cluster


@pytest.fixture
def training(checkpoint: Path) -> Iterator[ExpertCluster]:
    with ExpertCluster(checkpoint, replicas=HALVES, optimizer=SGD) as cluster:
        yield cluster


def tokens(seed: int = 0, dropped: float = 0.2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_TD, ids_TK with some assignments to skip (index 4), weights_TK."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(TOKENS, WIDTH, generator=generator)
    ids_TK = torch.stack([torch.randperm(len(EXPERTS), generator=generator)[:TOP_K] for _ in range(TOKENS)])
    ids_TK[torch.rand(TOKENS, TOP_K, generator=generator) < dropped] = len(EXPERTS)
    return x_TD, ids_TK, torch.rand(TOKENS, TOP_K, generator=generator)


def dense(
    modules: dict[int, nn.Module], x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    y_TD = torch.zeros_like(x_TD)
    for index, module in modules.items():
        rows, places = torch.where(ids_TK == index)
        y_TD = y_TD.index_add(0, rows, module(x_TD[rows]) * weights_TK[rows, places, None])
    return y_TD


def square_norm(modules: dict[int, nn.Module]) -> float:
    grads = [p.grad for module in modules.values() for p in module.parameters() if p.grad is not None]
    return sum(float(grad.double().square().sum()) for grad in grads)


def reduced_square_norm(cluster: ExpertCluster) -> float:
    sent = cluster.remote.sent(TAG)
    return sum(control.reduce(TAG, sent.get(name, [])).square_norm for name, control in cluster.pool.controls().items())


@torch.no_grad()
def check_served(remote: RemoteExperts, modules: dict[int, nn.Module], seed: int = 0) -> None:
    batch = tokens(seed)
    torch.testing.assert_close(remote(LAYER, *batch), dense(modules, *batch), atol=5e-6, rtol=0)


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
    """Nothing upstream wants a gradient, and still a graph is recorded."""
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
    """It calls forward again in backward."""
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
    assert dropped > 0 and f'dropped_assignments_total{{layer="{LAYER}",model="m"}} {dropped}.0' in text
    size = f"{rows * WIDTH * 4}.0"
    assert f'dispatch_bytes_total{{direction="sent",model="m",transport="in-process"}} {size}' in text
    assert f'dispatch_bytes_total{{direction="received",model="m",transport="in-process"}} {size}' in text


# -- what fails, and what comes of it --


class Moving:
    """A PlacementSource that publishes a newer placement when it is told to."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.changed = threading.Condition()
        self.reports: list[tuple[str, str]] = []

    def publish(self, **changes: object) -> None:
        with self.changed:
            self.placement = replace(self.placement, generation=self.placement.generation + 1, **changes)  # type: ignore[arg-type]
            self.changed.notify_all()

    def current(self, timeout_s: float) -> Placement:
        return self.placement

    def newer_than(self, number: tuple[int, int], timeout_s: float) -> Placement | None:
        with self.changed:
            self.changed.wait_for(lambda: self.placement.number > number, timeout_s)
            return self.placement if self.placement.number > number else None

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        self.reports.append((actor, reason))


def remote_over(cluster: ExpertCluster, source: FixedPlacement | Moving, timeout_s: float = TIMEOUT_S) -> RemoteExperts:
    pool = ExpertPool(
        source,
        connect=lambda address: InProcessTransport(cluster.services[address.actor]),
        control=lambda address: cluster.services[address.actor],
    )
    return RemoteExperts(pool, timeout_s=timeout_s)


def test_a_lost_replica_s_tokens_go_to_the_other(checkpoint: Path, modules: dict[int, nn.Module]) -> None:
    with ExpertCluster(checkpoint, replicas=TWICE) as cluster:
        source = Moving(cluster.placement)
        remote = remote_over(cluster, source)
        check_served(remote, modules)
        cluster.services["expert-0"].close()
        check_served(remote, modules)
        assert {actor for actor, _ in source.reports} == {"expert-0"}


def test_an_expert_that_an_actor_has_lost_is_asked_for_elsewhere_and_reported(
    checkpoint: Path, modules: dict[int, nn.Module]
) -> None:
    """The actor answers, but was started anew without its experts: its placement is no newer than the router's."""
    with ExpertCluster(checkpoint, replicas=TWICE) as cluster:
        source = Moving(cluster.placement)
        cluster.services["expert-1"].unload(term=1, experts=EXPERTS[1:3])
        check_served(remote_over(cluster, source), modules)
        assert source.reports[0][0] == "expert-1" and "are not here" in source.reports[0][1]


def call_in_thread(remote: RemoteExperts, caller: ThreadPoolExecutor) -> Callable[[], torch.Tensor]:
    @torch.no_grad()
    def call() -> torch.Tensor:
        return remote(LAYER, *tokens())

    future = caller.submit(call)
    return lambda: future.result(TIMEOUT_S)


def test_a_retry_changes_no_bit_of_a_sum_over_three_actors(checkpoint: Path) -> None:
    """Partial sums are added in the order of the actors, not of their answers."""
    names = [f"expert-{i}" for i in range(3)]
    with ExitStack() as running, ThreadPoolExecutor(1) as caller:
        services = {
            name: running.enter_context(serve(checkpoint, name, max_queue_bytes=TOKENS * WIDTH * 4)) for name in names
        }
        placement = Placement(
            term=1,
            generation=1,
            layer_experts={LAYER: len(EXPERTS)},
            actors={n: ActorAddress(actor=n, address="", incarnation=s.incarnation) for n, s in services.items()},
            replicas=tuple(Replica(expert=expert, actor=names[expert.index % 3]) for expert in EXPERTS),
        )
        metrics = Metrics(model="m")
        pool = ExpertPool(
            FixedPlacement(placement),
            connect=lambda address: InProcessTransport(services[address.actor]),
            control=lambda address: services[address.actor],
        )
        remote = RemoteExperts(pool, metrics=metrics)
        x_TD, _, _ = tokens()
        routing = torch.tensor([[0, 1, 2]]).expand(TOKENS, 3).contiguous(), torch.rand(TOKENS, 3)

        @torch.no_grad()
        def call() -> torch.Tensor:
            return remote(LAYER, x_TD, *routing)

        undisturbed = call()
        first = services["expert-0"]
        with Occupied(first):
            submit(first, batch_of(TOKENS))  # fills the queue
            result = caller.submit(call)
            while 'reason="exhausted"' not in metrics.render():
                time.sleep(0.002)
        assert torch.equal(result.result(TIMEOUT_S), undisturbed)


def test_only_the_pairs_that_moved_are_sent_again_by_the_newer_placement(
    checkpoint: Path, modules: dict[int, nn.Module]
) -> None:
    """An actor that knows a newer placement than the router: the router waits for it, and tells nobody."""
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster, ThreadPoolExecutor(1) as caller:
        source = Moving(cluster.placement)
        cluster.services["expert-0"].load(term=1, experts=EXPERTS, checkpoint=str(checkpoint))
        cluster.services["expert-1"].unload(term=1, experts=EXPERTS)
        for service in cluster.services.values():
            service.set_placement(term=1, generation=2)
        result = call_in_thread(remote_over(cluster, source), caller)
        time.sleep(0.1)
        source.publish(replicas=tuple(Replica(expert=expert, actor="expert-0") for expert in EXPERTS))
        batch = tokens()
        torch.testing.assert_close(result(), dense(modules, *batch).detach(), atol=5e-6, rtol=0)
        assert source.reports == []


def test_an_expert_without_any_replica_is_waited_for(checkpoint: Path, modules: dict[int, nn.Module]) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster, ThreadPoolExecutor(1) as caller:
        source = Moving(replace(cluster.placement, replicas=HALVES[:2]))
        result = call_in_thread(remote_over(cluster, source), caller)
        time.sleep(0.1)
        source.publish(replicas=HALVES)
        torch.testing.assert_close(result(), dense(modules, *tokens()).detach(), atol=5e-6, rtol=0)


@torch.no_grad()
def test_what_does_not_come_within_the_timeout_is_an_error_that_says_why(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster:
        remote = remote_over(cluster, Moving(replace(cluster.placement, replicas=HALVES[:2])), timeout_s=0.2)
        with pytest.raises(DeadlineExceeded, match=r"did not answer in time: layer 1: no replica of experts \[2, 3\]"):
            remote(LAYER, *tokens())
        hanging = remote_over(cluster, FixedPlacement(cluster.placement), timeout_s=0.2)
        with Occupied(cluster.services["expert-1"]), pytest.raises(DeadlineExceeded):
            hanging(LAYER, *tokens())


@torch.no_grad()
def test_a_layer_without_experts_is_an_error(checkpoint: Path) -> None:
    complaint = r"no experts of layer 7, only of \[1\]: the trunk is of another model"
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster, pytest.raises(UserError, match=complaint):
        cluster.remote(7, *tokens())


def test_an_attempt_ends_when_an_actor_is_gone(checkpoint: Path) -> None:
    """In training no other replica will do: it lacks the gradients so far."""
    with ExpertCluster(checkpoint, replicas=TWICE, optimizer=SGD) as cluster:
        remote = remote_over(cluster, FixedPlacement(cluster.placement))
        with remote.training(TAG):
            y_TD = remote(LAYER, *tokens())
            cluster.services["expert-1"].close()
            with pytest.raises(AttemptAborted, match="expert-1 is gone"):
                y_TD.sum().backward()
            with pytest.raises(AttemptAborted, match="expert-1 is gone"):
                remote(LAYER, *tokens())


def test_an_attempt_ends_when_another_life_of_the_actor_answers(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES, optimizer=SGD) as cluster:
        address = cluster.placement.actors["expert-1"]
        actors = {**cluster.placement.actors, "expert-1": replace(address, incarnation="before")}
        remote = remote_over(cluster, FixedPlacement(replace(cluster.placement, actors=actors)))
        with remote.training(TAG), pytest.raises(AttemptAborted, match="expert-1: this is incarnation"):
            remote(LAYER, *tokens())


def test_an_attempt_without_a_replica_for_an_expert_ends_at_once(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES, optimizer=SGD) as cluster:
        remote = remote_over(cluster, FixedPlacement(replace(cluster.placement, replicas=HALVES[:3])))
        with remote.training(TAG), pytest.raises(AttemptAborted, match=r"no replica of experts \[3\]"):
            remote(LAYER, *tokens())


def test_a_hanging_actor_ends_the_attempt_at_the_deadline(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES, optimizer=SGD) as cluster:
        remote = remote_over(cluster, FixedPlacement(cluster.placement), timeout_s=0.2)
        service = cluster.services["expert-0"]
        with Occupied(service), remote.training(TAG):
            with pytest.raises(AttemptAborted, match=r"expert-0: expert-0 did not answer in 0\.2 s"):
                remote(LAYER, *tokens())
            assert service._queue.rows > 0
        wait_for_rows(service, 0)

"""Experts that return NaN or infinity: their rows come from another replica, or only these rows are lost."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from moecluster.dispatch.exchange import Exchange
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import RequestFailed
from moecluster.metrics import Metrics
from moecluster.models.experts.source import ExpertSource
from moecluster.types import ExpertId, Replica
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.expert.small_actor import EXPERTS, LAYER, WIDTH
from tests.support.expert.small_layer import HALVES, TWICE, check_served, dense, tokens

SICK = ExpertId(layer=LAYER, index=2)


@pytest.fixture(params=[False, True], ids=["summed", "batch-invariant"])
def invariant(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def poison(cluster: ExpertCluster, actor: str, value: float = math.nan, expert: ExpertId = SICK) -> None:
    """From now on one replica's weights hold the value."""
    store = cluster.services[actor].store
    version = store.get(expert, 0).weight_version
    module = ExpertSource(cluster.directory).load(expert).requires_grad_(False)
    next(module.parameters()).view(-1)[0] = value
    store.add(expert, module, version)


class Lost:
    """Records the lost rows reported to an engine."""

    def __init__(self) -> None:
        self.rows: dict[int, str] = {}

    def __call__(self, layer: int, num_rows: int, reasons: Mapping[int, str]) -> None:
        assert layer == LAYER and num_rows == len(tokens()[0])
        self.rows |= reasons


def rows_of_sick(ids_TK: torch.Tensor) -> set[int]:
    return set(torch.where(ids_TK == SICK.index)[0].tolist())


@pytest.fixture
def fakes(checkpoint: Path, invariant: bool) -> Iterator[ExpertCluster]:
    with ExpertCluster(checkpoint, replicas=TWICE, batch_invariant=invariant) as cluster:
        yield cluster


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_of_a_sick_replica_are_answered_by_the_other_one(
    fakes: ExpertCluster, modules: dict[int, nn.Module], value: float
) -> None:
    poison(fakes, "expert-0", value)
    for seed in range(3):
        check_served(fakes.remote, modules, seed)
    assert [(actor, reason) for actor, _, reason in fakes.placements.failures] == [
        ("expert-0", f"{SICK} answers NaN or infinity")
    ], "it is told once"


def test_a_sick_replica_is_asked_no_more(fakes: ExpertCluster, modules: dict[int, nn.Module]) -> None:
    poison(fakes, "expert-0")
    check_served(fakes.remote, modules)
    table = fakes.pool.table(fakes.placement, LAYER)
    where = {expert.index: {table.actors[a] for a in table.actor_of_ER[expert.index] if a >= 0} for expert in EXPERTS}
    assert where == {e.index: {"expert-1"} if e == SICK else {"expert-0", "expert-1"} for e in EXPERTS}


def test_of_several_experts_and_actors_every_sick_replica_is_told_apart(
    fakes: ExpertCluster, modules: dict[int, nn.Module]
) -> None:
    poison(fakes, "expert-0")
    poison(fakes, "expert-1", expert=EXPERTS[0])
    for seed in range(8):  # in each, some row is sent to a faulty replica
        check_served(fakes.remote, modules, seed)
    assert {(actor, reason.split()[0]) for actor, _, reason in fakes.placements.failures} == {
        ("expert-0", str(SICK)),
        ("expert-1", str(EXPERTS[0])),
    }


def test_rows_that_no_replica_answers_are_lost_alone(
    checkpoint: Path, modules: dict[int, nn.Module], invariant: bool
) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES, batch_invariant=invariant) as cluster:
        metrics = Metrics(model="m")
        remote = RemoteExperts(cluster.pool, batch_invariant=invariant, metrics=metrics)
        poison(cluster, "expert-1")
        batch, lost = tokens(), Lost()
        with torch.no_grad():
            y_TD = remote(LAYER, *batch, on_lost=lost)
            expected_TD = dense(modules, *batch)
        assert lost.rows.keys() == rows_of_sick(batch[1]) and len(lost.rows) < len(y_TD)
        assert set(lost.rows.values()) == {f"expert {SICK.index} of layer {LAYER} answered NaN or infinity"}
        expected_TD[list(lost.rows)] = 0.0
        torch.testing.assert_close(y_TD, expected_TD, atol=5e-6, rtol=0)
        with pytest.raises(RequestFailed, match="expert 2 of layer 1 answered NaN or infinity"), torch.no_grad():
            remote(LAYER, *batch)
        assert len(cluster.placements.failures) == 1, "nobody is told the same again by the same placement"
        (series,) = [
            line for line in metrics.render().splitlines() if line.startswith("moecluster_nonfinite_replies_total{")
        ]
        assert 'actor="expert-1"' in series and f'expert="2",layer="{LAYER}"' in series and series.endswith(" 2.0")


def test_both_replicas_may_be_sick(fakes: ExpertCluster) -> None:
    poison(fakes, "expert-0")
    poison(fakes, "expert-1")
    with pytest.raises(RequestFailed, match="expert 2 of layer 1"), torch.no_grad():
        fakes.remote(LAYER, *tokens())
    assert {actor for actor, *_ in fakes.placements.failures} == {"expert-0", "expert-1"}


def test_a_row_that_is_too_much_for_every_replica_sets_none_aside(
    fakes: ExpertCluster, modules: dict[int, nn.Module]
) -> None:
    x_TD, ids_TK, weights_TK = tokens(dropped=0.0)
    x_TD[3] = 3e38
    lost = Lost()
    with torch.no_grad():
        y_TD = fakes.remote(LAYER, x_TD, ids_TK, weights_TK, on_lost=lost)
        expected_TD = dense(modules, x_TD, ids_TK, weights_TK)
    assert set(lost.rows) == {3} and "for this token's hidden state, though not for others" in lost.rows[3]
    expected_TD[3] = 0.0
    torch.testing.assert_close(y_TD, expected_TD, atol=5e-6, rtol=0)
    assert not fakes.placements.failures


@pytest.mark.parametrize("where", ["row", "weight"])
def test_no_expert_is_to_blame_for_what_came_in(
    fakes: ExpertCluster, modules: dict[int, nn.Module], where: str
) -> None:
    x_TD, ids_TK, weights_TK = tokens(dropped=0.0)
    (x_TD if where == "row" else weights_TK)[3, 0] = math.nan
    with torch.no_grad():
        y_TD = fakes.remote(LAYER, x_TD, ids_TK, weights_TK)
        expected_TD = dense(modules, x_TD, ids_TK, weights_TK)
    assert not torch.isfinite(y_TD[3]).all()
    others = [row for row in range(len(y_TD)) if row != 3]
    torch.testing.assert_close(y_TD[others], expected_TD[others], atol=5e-6, rtol=0)
    assert not fakes.placements.failures


def test_a_replica_that_was_wrong_once_answers_itself(
    fakes: ExpertCluster, modules: dict[int, nn.Module], invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit on the way: the same replica, asked again, says what is right."""
    send = Exchange.send_with_failover

    def flipped(*arguments: object, **named: object) -> object:
        (part, result), *others = send(*arguments, **named)  # type: ignore[arg-type]
        field = "y_PD" if invariant else "y_ND"
        rows = getattr(result, field).clone()
        rows[0] = math.nan
        return [(part, replace(result, **{field: rows})), *others]

    monkeypatch.setattr(Exchange, "send_with_failover", flipped)
    check_served(fakes.remote, modules)
    assert not fakes.placements.failures


def test_sums_that_overflow_are_lost_without_a_guilty_expert(checkpoint: Path) -> None:
    replicas = tuple(Replica(expert=expert, actor="expert-0") for expert in EXPERTS)
    with ExpertCluster(checkpoint, replicas=replicas, num_actors=1) as cluster:
        x_TD = torch.randn(2, WIDTH)
        weights_TK = torch.tensor([[3e38, 3e38], [0.5, 0.5]])
        lost: dict[int, str] = {}
        with torch.no_grad():
            y_TD = cluster.remote(
                LAYER,
                x_TD * 100,
                torch.tensor([[0, 1], [0, 1]]),
                weights_TK,
                on_lost=lambda _, __, rows: lost.update(rows),
            )
        assert set(lost) == {0} and torch.isfinite(y_TD).all() and not cluster.placements.failures

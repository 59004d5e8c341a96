"""Generation under load while the cluster is changed and its actors killed at random: the assertions and figures."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.report import Report, Row, installed_versions
from moecluster.types import ExpertId
from tests.support.clusters.ray_cluster import RayCluster, wait_for_result
from tests.support.soak.cluster_events import ClusterEvent, unordered
from tests.support.soak.event_latencies import EventLatencies, event_latencies
from tests.support.soak.generation_load import PROMPTS, Clients, Text, count_near_ties, generate, save_decided_model
from tests.support.soak.random_changes import RandomChanges

NUM_EXPERTS = 8  # of each of two layers
SETTINGS = {
    "cluster": {"num_expert_actors": 3},
    # Room for every expert on one actor; short periods, so that automatic changes mix with the requested ones.
    "controller": {"slots_per_layer": NUM_EXPERTS, "period_s": 0.5, "window_s": 5.0},
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """The results of a run."""

    happened: Sequence[ClusterEvent]
    refused: Sequence[str]
    unordered: Sequence[ClusterEvent]
    texts: Sequence[Text]
    excused: int
    event_latencies: Sequence[EventLatencies]


def soak(directory: Path, *, operations: int, kills: int, duration_s: float, seed: int) -> Found:
    """Asserts that no request failed or got wrong tokens, that every operation was done (or, if it failed, coincided
    with a kill), and that the cluster is whole afterwards."""
    model = save_decided_model(directory / "model", num_experts=NUM_EXPERTS)
    checkpoints = (model, str(shutil.copytree(model, directory / "copy")))
    with RayCluster(model, SETTINGS) as cluster:
        texts = {prompt: generate(cluster, prompt) for prompt in PROMPTS}
        undisturbed = {prompt: text.ids for prompt, text in texts.items()}
        assert len(set(undisturbed.values())) == len(PROMPTS)
        wanted = {expert for text in texts.values() for expert, count in text.experts.items() if count}
        changes = RandomChanges(cluster, wanted=sorted(wanted), checkpoints=checkpoints, seed=seed)
        with Clients(cluster) as clients:
            changes.run(operations=operations, kills=kills, duration_s=duration_s)
        excused = count_near_ties(clients.texts, undisturbed, model)
        assert_operations_ended_well(changes.happened)
        assert_whole(cluster)
        count_near_ties([generate(cluster, prompt) for prompt in PROMPTS], undisturbed, model)
    by_itself = unordered(changes.unordered.values())
    return Found(
        happened=changes.happened,
        refused=changes.refused,
        unordered=by_itself,
        texts=clients.texts,
        excused=excused,
        event_latencies=event_latencies([text.chunks_s for text in clients.texts], [*changes.happened, *by_itself]),
    )


def assert_operations_ended_well(happened: Sequence[ClusterEvent]) -> None:
    kills = [h for h in happened if h.kind.startswith("kill")]
    failed = [h for h in happened if h.failure]
    unmet = [h for h in failed if not any(k.overlaps(h.begun_s, h.ended_s) for k in kills)]
    assert not unmet, "operations failed though nothing was killed meanwhile"


def assert_whole(cluster: RayCluster) -> None:
    """Waits for running operations, then asserts that every expert is served and the actors are those that the
    controller knows."""
    wait_for_result(lambda: not cluster.wait_served().operations, "all operations have ended")
    status = cluster.wait_served()
    assert {actor.actor for actor in status.actors} == {a for a in cluster.driver.actors() if a.startswith("expert-")}
    with cluster.placements() as placements:
        placement = placements.current(10.0)
    for layer, count in placement.layer_experts.items():
        for index in range(count):
            replicas = placement.replicas_of(ExpertId(layer=layer, index=index))
            assert sum(r.share for r in replicas) == pytest.approx(1.0), (layer, index)


def show(found: Found, console: Console) -> None:
    """Prints the counts, and the waits as a table."""
    for row in _counts(found):
        console.print(f"{row.value:g} {row.name}", highlight=False)
    table = Table("next token during", "of them", "tokens", "p50 ms", "p99 ms", "max ms", title="waits")
    for latency in found.event_latencies:
        waits_s = (latency.p50_s, latency.p99_s, latency.max_s)
        table.add_row(latency.kind, str(latency.events), str(latency.tokens), *(f"{1e3 * s:.0f}" for s in waits_s))
    console.print(table)


def report(found: Found) -> Report:
    """Returns the figures of a run, in the format of benchmarks/results."""
    rows = _counts(found)
    for latency in found.event_latencies:
        for figure, value_s in (("p50", latency.p50_s), ("p99", latency.p99_s), ("max", latency.max_s)):
            name = f"next token during {latency.kind}: {figure}"
            rows.append(Row(name=name, runs=[1e3 * value_s], unit="ms", better="lower"))
    raw = {
        "happened": [asdict(h) for h in found.happened],
        "refused": list(found.refused),
        "unordered": dict(Counter(f"{h.kind}{', in vain' * bool(h.failure)}" for h in found.unordered)),
        "waits": [asdict(latency) for latency in found.event_latencies],
    }
    return Report(name="soak", rows=rows, raw=raw, versions=installed_versions())


def _counts(found: Found) -> list[Row]:
    operations = [h for h in found.happened if not h.kind.startswith("kill")]
    kills = [h for h in found.happened if h.kind.startswith("kill")]
    failures = float(sum(bool(text.failure) for text in found.texts))
    return [
        _count("requests", len(found.texts)),
        Row(name="requests that failed", runs=[failures], unit="", target=0.0, better="lower"),
        _count("texts that part from the undisturbed ones at a near tie", found.excused),
        _count("operations done", sum(not h.failure for h in operations)),
        _count("operations that failed, each met by a kill", sum(bool(h.failure) for h in operations)),
        _count("orders refused, for which others were drawn", len(found.refused)),
        _count("SIGKILLs of expert actors", sum(h.kind == "kill expert" for h in kills)),
        _count("SIGKILLs of the controller", sum(h.kind == "kill controller" for h in kills)),
        _count("SIGKILLs amid an operation", sum(bool(h.amid) for h in kills)),
        _count("operations that nobody ordered", len(found.unordered)),
    ]


def _count(name: str, count: int) -> Row:
    return Row(name=name, runs=[float(count)], unit="")

"""A failing generation raises an error: it never just ends early."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from moecluster.errors import DeadlineExceeded, MoeClusterError
from moecluster.generation import GenerationRequest
from moecluster.metrics import Metrics
from moecluster.router.engine.engine import EngineLimits
from moecluster.router.router import Router
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.given import any_directory

CALLS_BEFORE = 7  # of layers: three tokens and a half


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ExpertCluster]]:
    directory = save_tiny_model(tmp_path_factory.mktemp("model"))
    with ExpertCluster(directory) as running:
        yield directory, running


@pytest.mark.parametrize(
    ("error", "kind"), [(KeyError("expert-1"), MoeClusterError), (DeadlineExceeded("too late"), DeadlineExceeded)]
)
def test_an_error_amid_a_request_reaches_its_reader(
    cluster: tuple[str, ExpertCluster], monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    directory, experts = cluster
    metrics = Metrics(model="tiny")
    limits = EngineLimits(max_running=4, max_cached_tokens=1024)
    router = Router(Path(directory), experts.remote, is_given=any_directory, limits=limits, metrics=metrics)
    placement, calls = experts.pool.placement, 0

    def failing(timeout_s: float = 60.0) -> object:
        nonlocal calls
        calls += 1
        if calls > CALLS_BEFORE:
            raise error
        return placement(timeout_s)

    monkeypatch.setattr(experts.pool, "placement", failing)
    chunks = []
    with pytest.raises(kind, match=r"expert-1|too late"):
        for chunk in router.generate(GenerationRequest(request_id="r", prompt="import", max_new_tokens=50)):
            chunks.append(chunk)
    assert all(not chunk.finish_reason for chunk in chunks)
    assert 'moecluster_requests_total{cluster="",model="tiny",status="failed"} 1.0' in metrics.render()

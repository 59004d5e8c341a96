"""Even authorized callers cannot make a cluster read a directory that it was not given; attempts change nothing."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from moecluster.controller.operations.weight_rollout import UpdateSettings
from moecluster.errors import NotGiven
from moecluster.models.given_directories import IsGiven, is_within
from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.rpc.server import open_channel
from moecluster.types import ActorAddress, ExpertId, OperationPhase, OptimizerSettings
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.models.weight_versions import PROMPTS, done, ended, requests_alone, save_version, write

EXPERT = ExpertId(layer=0, index=0)
REFUSED = "the cluster was not given this directory"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """given/first is served; secret is another model of the same owner, reached by several names."""
    root = tmp_path_factory.mktemp("models")
    save_version(root / "given/first", 0)
    save_version(root / "given/second", 1)
    save_version(root / "secret", 2)
    (root / "given/first/link").symlink_to(root / "secret")
    return root


class Guard:
    """The directories that each part of a cluster may load, and those that the controller has announced."""

    def __init__(self, given: Path) -> None:
        self._given = [str(given)]
        self._open: frozenset[str] = frozenset()
        self.announced: list[str] = []

    def is_given_to(self, part: str) -> IsGiven:
        return lambda path: part in self._open or is_within(path, directories=self._given)

    @contextmanager
    def letting_through(self, *parts: str) -> Iterator[None]:
        """Inside the with block, these parts accept every directory."""
        self._open = frozenset(parts)
        try:
            yield
        finally:
            self._open = frozenset()


@pytest.fixture(scope="module")
def guard(root: Path) -> Guard:
    return Guard(root / "given")


@pytest.fixture(scope="module")
def cluster(root: Path, guard: Guard) -> Iterator[LoopbackCluster]:
    with LoopbackCluster(
        str(root / "given/first"),
        is_given_to=guard.is_given_to,
        announce=guard.announced.append,
        update=UpdateSettings(old_requests_timeout_s=0.3),
    ) as cluster:
        yield cluster


NAMES = ("secret", "given/../secret", "given/first/link", "given/first/../../secret", "nowhere")
Order = Callable[[GrpcExpertControl, str], Any]
LOADS: dict[str, Order] = {
    "beside": lambda control, path: control.load(
        LoadRequest(term=9, experts=(EXPERT,), checkpoint=path, weight_version=2)
    ),
    "instead": lambda control, path: control.load(
        LoadRequest(term=9, experts=(EXPERT,), checkpoint=path, replace=True)
    ),
    "nothing": lambda control, path: control.load(LoadRequest(term=9, experts=(), checkpoint=path)),
    "to train": lambda control, path: control.load(
        LoadRequest(
            term=9, experts=(EXPERT,), checkpoint=path, optimizer=OptimizerSettings(), training_term=9, replace=True
        )
    ),
    "out of a peer": lambda control, path: control.load(
        LoadRequest(
            term=9,
            experts=(EXPERT,),
            checkpoint=path,
            replace=True,
            peer=ActorAddress(actor="expert-1", address="127.0.0.1:1", incarnation="a"),
        )
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", LOADS)
def test_an_expert_actor_loads_nothing_out_of_it(cluster: LoopbackCluster, root: Path, order: str, name: str) -> None:
    service = cluster.services["expert-0"]
    before = service.status()
    with closing(GrpcExpertControl("expert-0", cluster.servers["expert-0"].address)) as control:
        with pytest.raises(NotGiven, match=f"{name}: {REFUSED}"):
            LOADS[order](control, f"{root}/{name}")
        # The controller's own term, far below the refused request's, is still accepted.
        term = cluster.controller.status().term
        control.load(LoadRequest(term=term, experts=(EXPERT,), checkpoint=str(root / "given/first")))
    after = service.status()
    assert (after.experts, after.hosted_bytes, after.weight_version, after.training_term) == (
        before.experts,
        before.hosted_bytes,
        before.weight_version,
        before.training_term,
    )


@pytest.mark.parametrize("path", ["", ".", "given/first", "/\0", "/a\n\x1b[31mb", "/" + "x" * 5000])
def test_what_is_no_path_at_all_is_refused_alike(cluster: LoopbackCluster, path: str) -> None:
    refs = [tensor_pb2.ExpertRef(layer=0, index=0)]
    request = expert_pb2.LoadRequest(term=9, experts=refs, checkpoint=path, timeout_s=10.0)
    with open_channel(cluster.servers["expert-0"].address) as channel, pytest.raises(grpc.RpcError) as refused:
        ExpertServiceStub(channel).Load(request, timeout=20.0)
    error: Any = refused.value
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert REFUSED in error.details() and error.details().isprintable() and len(error.details()) < 400


@pytest.mark.parametrize("name", NAMES)
def test_the_controller_takes_no_order_that_names_it(
    cluster: LoopbackCluster, guard: Guard, root: Path, name: str
) -> None:
    announced = list(guard.announced)
    before = cluster.controller.status()
    with ControllerCalls(cluster.controller_server.address) as calls:
        with pytest.raises(NotGiven, match=f"{name}: {REFUSED}"):
            calls.set_checkpoint(f"{root}/{name}")
        with pytest.raises(NotGiven, match=f"{name}: {REFUSED}"):
            calls.update(f"{root}/{name}")
        after = calls.status()
        assert calls.operations(0) == cluster.controller.operations(0) == ()
    assert (after.checkpoint, after.weight_version) == (before.checkpoint, before.weight_version)
    assert guard.announced == announced, "nor are other nodes told where it is"


@pytest.mark.parametrize("name", NAMES)
def test_a_router_takes_no_trunk_out_of_it(cluster: LoopbackCluster, root: Path, name: str) -> None:
    before = cluster.router.status()
    with pytest.raises(NotGiven, match=f"{name}: {REFUSED}"):
        cluster.router.reload(f"{root}/{name}")
    assert cluster.router.status().model == before.model


def test_each_part_asks_by_itself_and_what_was_given_is_taken(
    cluster: LoopbackCluster, guard: Guard, root: Path
) -> None:
    """If the controller accepts everything, the actors and the routers still refuse."""
    first, second, secret = (str(root / name) for name in ("given/first", "given/second", "secret"))
    with guard.letting_through("controller"):
        failed = ended(cluster, cluster.controller.update(secret))
        assert failed.phase is OperationPhase.FAILED and f"{secret}: {REFUSED}" in failed.detail
    with guard.letting_through("controller", *cluster.names):  # the router still refuses
        failed = ended(cluster, cluster.controller.update(secret))
        assert failed.phase is OperationPhase.FAILED and f"{secret}: {REFUSED}" in failed.detail, failed
        assert "router" in failed.detail
    assert cluster.controller.status().checkpoint == cluster.router.status().model == first
    done(cluster, cluster.controller.update(second))
    assert cluster.router.status().model == second
    assert write(cluster, PROMPTS[0]).ids == requests_alone(second)[PROMPTS[0]]

"""One real Ray cluster for all tests that need one (tests/cluster, tests/faults).

    def test_something(ray_session: RaySession, ray_namespace: str) -> None:
        ray_session.address     # for commands: moecluster status --address ...
        ray_namespace           # a fresh namespace; named actors left in it are killed after the test

The cluster has one node with NUM_CPUS logical CPUs (actors that need more wait), token authentication
(tests/conftest.py), no dashboard, and its files in a folder of its own, which is kept if a test failed. A test that
needs other settings, or ends nodes, starts its own Ray in a subprocess.
"""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.util import list_named_actors

NUM_CPUS = 4
OBJECT_STORE_BYTES = 256 * 1024**2


@dataclass(frozen=True, kw_only=True)
class RaySession:
    """The running cluster."""

    address: str  # host:port of its control store
    num_cpus: int  # logical CPUs in all


@pytest.fixture(scope="session")
def ray_session(request: pytest.FixtureRequest) -> Iterator[RaySession]:
    folder = Path(tempfile.mkdtemp(prefix="moe-ray-"))  # short, since paths of Ray's sockets in it are limited
    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(folder),
    )
    yield RaySession(address=ray.get_runtime_context().gcs_address, num_cpus=NUM_CPUS)
    ray.shutdown()
    if not request.session.testsfailed:
        shutil.rmtree(folder, ignore_errors=True)  # workers that are still ending may write into it


@pytest.fixture
def ray_namespace(ray_session: RaySession) -> Iterator[str]:
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    yield namespace
    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == namespace:
            ray.kill(ray.get_actor(actor["name"], namespace=namespace))

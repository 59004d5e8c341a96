"""An engine on a tiny model, with continuous and with static batching."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import GenerationConfig

from moecluster.dispatch.trunk_backend import TrunkBackend
from moecluster.hf.interface import moe_layers
from moecluster.models.tokenizer.load import load_tokenizer
from moecluster.models.trunk import load_trunk
from moecluster.router.engine import factory as making
from moecluster.router.engine.engine import Engine, EngineLimits
from moecluster.router.engine.factory import make_engine
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.models.engine_sequences import LIMITS, MakeTestEngine
from tests.support.soak.generation_load import save_decided_model


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ExpertCluster]]:
    directory = tmp_path_factory.mktemp("model")
    save_decided_model(directory)
    with ExpertCluster(directory) as running:
        yield directory, running


@pytest.fixture(scope="module", params=["paged", "padded"])
def engine(request: pytest.FixtureRequest, cluster: tuple[Path, ExpertCluster]) -> Iterator[MakeTestEngine]:
    """Makes an engine with these limits, or returns the one made before."""
    directory, experts = cluster
    made: dict[tuple[EngineLimits, str], Engine] = {}

    def make(limits: EngineLimits = LIMITS, settings: GenerationConfig | None = None) -> Engine:
        """settings: content of the checkpoint's generation_config.json."""
        kind = (limits, repr(settings))
        if kind not in made:
            backend = TrunkBackend(experts.remote, 0)
            model = load_trunk(directory, backend)
            backend.layer_experts = {record.layer: record.num_experts for record in moe_layers(model)}
            model.generation_config = settings or model.generation_config
            made[kind] = make_engine(model, load_tokenizer(directory), backend, limits=limits)
        return made[kind]

    with pytest.MonkeyPatch.context() as patches:
        if request.param == "padded":
            patches.setattr(making, "supports_paging", lambda model: False)
        yield make
    for running in made.values():
        running.close()

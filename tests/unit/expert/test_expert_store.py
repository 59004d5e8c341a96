"""An expert actor with experts in several weight versions."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecluster.errors import CheckpointError, InvalidMessage, NotHosted, StaleRequest
from moecluster.expert.service import ExpertService
from moecluster.models.checkpoint.reader import SINGLE_FILE_NAME
from moecluster.models.update.compose import compose
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import ComputeBatch, ExpertId
from tests.support.clusters.given import any_directory
from tests.support.expert.small_actor import EXPERTS, SGD, ask, batch_of, check_rows, load_modules
from tests.support.models.families import make_model, save


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoint directories of the weight versions 1, 2 and 3."""
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        save(make_model("moecluster", seed), root / str(seed), "per-expert")
    return [root / str(seed) for seed in range(3)]


@pytest.fixture
def service(checkpoints: list[Path]) -> Iterator[ExpertService]:
    """A service that serves version 1 and has also loaded version 2."""
    with closing(ExpertService(is_given=any_directory, name="expert-0")) as service:
        stand(service, 1, (1,))
        for version in (1, 2):
            load(service, checkpoints, version)
        yield service


def load(service: ExpertService, checkpoints: list[Path], version: int) -> int:
    checkpoint = str(checkpoints[version - 1])
    return service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=checkpoint, weight_version=version))


def stand(service: ExpertService, served: int, versions: tuple[int, ...], generation: int = 1) -> None:
    service.set_placement(
        PlacementNotice(term=1, generation=generation, weight_version=served, weight_versions=versions)
    )


def check(service: ExpertService, checkpoints: list[Path], version: int, batch: ComputeBatch) -> None:
    check_rows(load_modules(checkpoints[version - 1]), batch, ask(service, batch))


def test_a_batch_is_computed_in_its_version(service, checkpoints) -> None:
    for version in (1, 2):
        check(service, checkpoints, version, batch_of(weight_version=version))
    check(service, checkpoints, 1, batch_of())
    stand(service, 2, (1, 2), generation=2)
    check(service, checkpoints, 2, batch_of())
    check(service, checkpoints, 1, batch_of(weight_version=1))
    with pytest.raises(NotHosted, match="are not here in weight version 3") as refused:
        ask(service, batch_of(weight_version=3))
    assert refused.value.placement == (1, 2), "it may come"


def test_a_dropped_version_is_gone_for_good_and_its_memory_returns(service) -> None:
    one_version = service.status().hosted_bytes // 2
    assert service.status().held(2) == EXPERTS and service.status().other_versions == {2: EXPERTS}
    stand(service, 2, (1, 2), generation=2)
    assert (service.status().weight_version, service.status().other_versions) == (2, {1: EXPERTS})
    stand(service, 2, (2,), generation=3)
    assert service.status().other_versions == {} and service.status().hosted_bytes == one_version
    with pytest.raises(StaleRequest, match="weight version 1 is not served any more: 2 is"):
        ask(service, batch_of(weight_version=1))
    stand(service, 1, (1,), generation=1)  # delayed and outdated
    assert service.status().experts == EXPERTS
    with pytest.raises(InvalidMessage, match="weight_version: 3 is none of"):
        stand(service, 3, (2,), generation=4)


def test_a_version_that_was_given_up_leaves_the_one_that_is_served(service, checkpoints) -> None:
    stand(service, 1, (1,), generation=2)
    assert service.status().other_versions == {}
    check(service, checkpoints, 1, batch_of())


def test_an_unloaded_expert_is_gone_in_all_versions(service) -> None:
    service.unload(term=1, experts=EXPERTS[:1])
    assert service.status().experts == EXPERTS[1:] == service.status().held(2)


def test_what_came_before_a_version_was_named_is_of_the_one_that_is_served(checkpoints) -> None:
    with closing(ExpertService(is_given=any_directory, name="expert-0")) as service:
        service.load(
            LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoints[0]), optimizer=SGD, training_term=1)
        )
        stand(service, 5, (5,))
        assert (service.status().weight_version, service.status().experts) == (5, EXPERTS)
        assert service.status().training_term == 1 and service.trains(EXPERTS[0])
        check(service, checkpoints, 1, batch_of(weight_version=5))
        # Trained experts are no longer served once the next version has replaced them.
        service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoints[1]), weight_version=6))
        assert service.trains(EXPERTS[0])
        stand(service, 6, (6,), generation=2)
        assert not service.trains(EXPERTS[0])


def test_the_peer_s_version_is_named(service) -> None:
    def exported(version: int) -> Any:
        tensors = list(service.export(experts=EXPERTS[:1], with_optimizer=False, weight_version=version))
        assert {t.weight_version for t in tensors} == {version or 1}
        return tensors[0].value

    assert torch.equal(exported(0), exported(1)) and not torch.equal(exported(0), exported(2))
    with pytest.raises(NotHosted, match="expert 1/0 is not here in weight version 3"):
        exported(3)


def test_experts_that_both_versions_read_from_the_same_bytes_are_held_once(checkpoints, tmp_path) -> None:
    # Experts in the same shard as a replaced one are rewritten too: one expert per shard is best.
    make_model("moecluster", 0).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    make_model("moecluster", 1).save_pretrained(tmp_path / "others", max_shard_size="10KB")
    compose(tmp_path / "shards", tmp_path / "others", tmp_path / "mixed", experts=EXPERTS[2:3], keep_trunk=True)
    with closing(ExpertService(is_given=any_directory, name="expert-0")) as service:
        stand(service, 1, (1, 2))

        def load_from(directory: str, version: int) -> int:
            checkpoint = str(tmp_path / directory)
            return service.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=checkpoint, weight_version=version))

        whole = load_from("shards", 1)
        added = load_from("mixed", 2)
        assert whole // 4 <= added < whole, "the others are shared"
        assert service.status().hosted_bytes == whole + added
        stand(service, 2, (2,), generation=2)
        assert service.status().hosted_bytes == whole
        modules = load_modules(checkpoints[0]) | {2: load_modules(checkpoints[1])[2]}
        check_rows(modules, batch_of(), ask(service, batch_of()))
        # A rewritten file is another origin, although its name is the same.
        for file in (tmp_path / "mixed").glob("*.safetensors"):
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)
        stand(service, 2, (2, 3), generation=3)
        assert load_from("mixed", 3) == whole


def test_a_directory_that_was_written_anew_is_opened_anew(checkpoints, tmp_path) -> None:
    directory = shutil.copytree(checkpoints[0], tmp_path / "again")
    file = directory / SINGLE_FILE_NAME
    with closing(ExpertService(is_given=any_directory, name="expert-0")) as service:
        stand(service, 1, (1, 2))

        def load_again(experts: tuple[ExpertId, ...], version: int) -> None:
            service.load(LoadRequest(term=1, experts=experts, checkpoint=str(directory), weight_version=version))

        load_again(EXPERTS[:2], 1)
        tensors = load_file(checkpoints[1] / SINGLE_FILE_NAME)
        save_file(tensors, file, metadata={"format": "pt", "note": "so that every tensor lies elsewhere" * 10})
        load_again(EXPERTS, 2)
        stand(service, 2, (1, 2), generation=2)
        check(service, checkpoints, 2, batch_of())
        save_file(tensors, file, metadata={"format": "pt"})
        for _ in range(2):  # its other experts have the old weights
            with pytest.raises(CheckpointError, match="has changed since it was opened"):
                load_again(EXPERTS[2:], 1)

"""No number in a request can lock out all others: one far ahead of the known ones is refused and changes nothing."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moecluster.controller.actors.interfaces import DesiredState
from moecluster.controller.actors.session import ActorSession
from moecluster.controller.state.handover import initial_state
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.errors import InvalidMessage
from moecluster.expert.service import ExpertService
from moecluster.growing import MAX_AHEAD, MAX_AHEAD_AT_START, MAX_NUMBER, check_ahead
from moecluster.rpc.controller.snapshot import ControllerSnapshot, decode_snapshot, encode_snapshot
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import ActorAddress, OptimizerSettings, StepTag, WeightVersion
from tests.support.expert.small_actor import EXPERTS, SGD, save_small_model, training

HUGE = (2**64 - 1, 2**63, 2**62 + 1)
JUST_TOO_FAR = 7 + MAX_AHEAD + 1  # the highest numbers known to the actor below are at most 7
TERM, STEP, VERSION = 7, 1, 3

Order = Callable[[ExpertService, int], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def service(checkpoint: Path) -> Iterator[ExpertService]:
    """A training service that knows a placement and a weight version."""
    with training(checkpoint, term=TERM) as service:
        service.set_placement(
            PlacementNotice(
                term=TERM, generation=4, checkpoint=str(checkpoint), weight_version=VERSION, weight_versions=(VERSION,)
            )
        )
        yield service


def tag(term: int = TERM, step: int = STEP, attempt: int = 1) -> StepTag:
    return StepTag(term=term, step=step, attempt=attempt)


def load(service: ExpertService, *, optimizer: OptimizerSettings | None = None, **changed: int) -> object:
    request = LoadRequest(
        term=TERM,
        experts=EXPERTS,
        checkpoint=service.status().checkpoint,
        training_term=TERM,
        optimizer=optimizer,
    )
    return service.load(replace(request, **changed))  # type: ignore[arg-type]


def place(service: ExpertService, **changed: int) -> None:
    versions = (changed.get("weight_version", VERSION),)
    notice = PlacementNotice(
        term=TERM, generation=5, checkpoint="/elsewhere", weight_version=VERSION, weight_versions=versions
    )
    service.set_placement(replace(notice, **changed))  # type: ignore[arg-type]


ORDERS: dict[str, Order] = {
    "SetPlacement.term": lambda service, n: place(service, term=n),
    "SetPlacement.generation": lambda service, n: place(service, term=TERM + 1, generation=n),
    "SetPlacement.weight_version": lambda service, n: place(service, term=TERM + 1, weight_version=n),
    "SetPlacement.weight_versions": lambda service, n: service.set_placement(
        PlacementNotice(term=TERM + 1, generation=5, weight_version=VERSION, weight_versions=(VERSION, n))
    ),
    "Load.term": lambda service, n: load(service, term=n),
    "Load.weight_version": lambda service, n: load(service, term=TERM + 1, weight_version=n),
    "Load.training_term": lambda service, n: load(service, term=TERM + 1, training_term=n, optimizer=SGD),
    "Unload.term": lambda service, n: service.unload(term=n, experts=EXPERTS),
    "Status.training_term": lambda service, n: service.status(n),
    "Reduce.term": lambda service, n: service.reduce(tag(term=n), []),
    "Reduce.step": lambda service, n: service.reduce(tag(term=TERM + 1, step=n), []),
    "Reduce.attempt": lambda service, n: service.reduce(tag(term=TERM + 1, attempt=n), []),
    "Prepare.term": lambda service, n: service.prepare(tag(term=n), clip_scale=1.0, learning_rate=0.1),
    "Prepare.attempt": lambda service, n: service.prepare(
        tag(term=TERM + 1, attempt=n), clip_scale=1.0, learning_rate=0.1
    ),
    "Commit.term": lambda service, n: service.commit(tag(term=n)),
    "Abort.term": lambda service, n: service.abort(tag(term=n)),
    "Abort.step": lambda service, n: service.abort(tag(term=TERM + 1, step=n)),
    "Abort.attempt": lambda service, n: service.abort(tag(term=TERM + 1, attempt=n)),
}


@pytest.mark.parametrize("number", [*HUGE, JUST_TOO_FAR])
@pytest.mark.parametrize("order", ORDERS)
def test_a_number_far_ahead_is_refused_and_changes_nothing(service: ExpertService, order: str, number: int) -> None:
    if number == JUST_TOO_FAR and order in ("SetPlacement.generation", "Load.training_term"):
        number = {"SetPlacement.generation": MAX_NUMBER, "Load.training_term": TERM + MAX_AHEAD_AT_START}[order] + 1
    before = service.status(with_snapshot=True)
    with pytest.raises(InvalidMessage, match=f"{number}, (expected )?at most"):
        ORDERS[order](service, number)
    after = service.status(with_snapshot=True)
    for field in ("placement", "checkpoint", "experts", "other_versions", "weight_version", "training_term",
                  "committed", "prepared", "hosted_bytes"):  # fmt: skip
        assert getattr(after, field) == getattr(before, field), field
    # The current controller is unaffected, in the same terms and in the next.
    service.set_placement(PlacementNotice(term=TERM, generation=5, weight_version=VERSION, weight_versions=(VERSION,)))
    assert service.reduce(tag(), []).square_norm == 0.0
    service.abort(tag())
    place(service, term=TERM + 1, generation=1)
    assert service.status(TERM + 1).training_term == TERM + 1


def test_the_bound_itself_is_taken() -> None:
    check_ahead(5 + MAX_AHEAD, 5, "term")
    with pytest.raises(InvalidMessage, match=rf"term: {6 + MAX_AHEAD}, expected at most {MAX_AHEAD} above 5"):
        check_ahead(6 + MAX_AHEAD, 5, "term")


def test_whoever_was_let_jump_as_far_as_it_goes_is_followed(service: ExpertService, checkpoint: Path) -> None:
    """A successor takes one more than the highest term that any actor has seen; the others have seen far lower ones."""
    place(service, term=TERM + MAX_AHEAD, generation=MAX_NUMBER)
    nothing = ControllerSnapshot(actors=(), leaving=(), replicas=(), operations=(), cold=())
    found = initial_state([service.status()], first=nothing, checkpoint=str(checkpoint))
    assert found.term == TERM + MAX_AHEAD + 1
    assert found.generation == 0  # a higher term may restart generations, which are never compared across terms
    with training(checkpoint) as behind:
        incarnation = ActorSession(
            ActorAddress(actor="expert-0", address="", incarnation=behind.incarnation),
            Fenced(behind, found.term),  # type: ignore[arg-type]
            owner=Owner(found.term),  # type: ignore[arg-type]
            load_timeout_s=10.0,
        )
        with pytest.raises(Told):
            incarnation.load()
        assert behind.status().experts == EXPERTS


class Told(Exception):
    """Raised when the actor has received the successor's placement."""


class Fenced:
    """An ExpertControl of a service, which ends the test once it has received a placement."""

    def __init__(self, service: ExpertService, term: int) -> None:
        self._service, self._term = service, term
        self.status, self.unload = service.status, service.unload

    def set_placement(self, notice: PlacementNotice) -> None:
        self._service.set_placement(PlacementNotice(term=notice.term, generation=notice.generation))
        assert self._service.status().placement.term == notice.term == self._term
        raise Told


class Owner:
    """A MonitorOwner that only has a term."""

    def __init__(self, term: int) -> None:
        self._term = term

    def desired_state(self) -> object:
        versions = WeightVersions.only(WeightVersion(version=1, checkpoint="/m"))
        return DesiredState(term=self._term, generation=1, versions=versions, dtype="")


def test_a_snapshot_whose_version_numbers_run_away_is_not_taken_over() -> None:
    snapshot = ControllerSnapshot(
        actors=("expert-0",), leaving=(), replicas=(), operations=(), cold=(),
        versions=(WeightVersion(version=2, checkpoint="/m"),), weight_version=2,
        last_weight_version=2**64 - 1,
    )  # fmt: skip
    with pytest.raises(InvalidMessage, match="last_weight_version: 18446744073709551615"):
        decode_snapshot(encode_snapshot(snapshot))

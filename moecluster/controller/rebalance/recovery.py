"""Whether lost experts can be loaded on other actors now, which comes before every other change."""

from collections.abc import Iterator
from contextlib import contextmanager

from moecluster.controller.context import ControllerContext
from moecluster.types import ExpertId


class Recovery:
    """One thread at a time makes attempts; any thread may ask whether one is due."""

    def __init__(self, context: ControllerContext, *, slots_per_layer: int) -> None:
        self._state = context.state
        self._slots_per_layer = slots_per_layer
        self._tried_in_vain: tuple[frozenset[ExpertId], frozenset[str]] | None = None  # (lost experts, actors up)

    def is_possible(self) -> bool:
        """Whether experts are lost, and the layer of one has a free slot on an actor that is up and not leaving."""
        return bool(self._state.lost()) and self._has_free_slots()

    def is_due(self) -> bool:
        """Whether recovery is possible, and has not failed with the same lost experts and actors."""
        return self.is_possible() and self._situation() != self._tried_in_vain

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Encloses an attempt. If it leaves experts lost, other changes no longer give way to the same recovery."""
        before = self._situation()
        yield
        self._tried_in_vain = before if self._state.lost() else None

    def _situation(self) -> tuple[frozenset[ExpertId], frozenset[str]]:
        return self._state.lost(), frozenset(self._state.up())

    def _has_free_slots(self) -> bool:
        up = [a for a in self._state.up() if a not in self._state.leaving]
        replicas = self._state.replicas()
        for layer in {expert.layer for expert in self._state.lost()}:
            num_replicas = sum(r.expert.layer == layer and r.actor in up for r in replicas)
            if num_replicas < len(up) * self._slots_per_layer:
                return True
        return False

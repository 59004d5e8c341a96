"""The backend of a trunk: its calls of the experts, and what watchers, captures and dry runs see of them."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.dispatch.trunk_backend import TrunkBackend
from moecluster.errors import UnsupportedModelError

TIMEOUT_S = 30.0
LAYER, NUM_EXPERTS = 1, 4


class TwiceTheRows:
    """A fake RemoteExperts that records its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.Tensor, int, Any]] = []  # ids_TK, weight version, on_lost

    def __call__(
        self,
        layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        weight_version: int,
        on_lost: Any,
    ) -> torch.Tensor:
        self.asked.append((ids_TK, weight_version, on_lost))
        return 2 * x_TD


class Watcher:
    """A watcher that lets only some rows be computed."""

    def __init__(self, computed: list[bool] | None) -> None:
        self.computed = computed
        self.seen: list[tuple[int, list[list[int]], int]] = []

    def see(self, layer: int, ids_TK: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.bool_] | None:
        self.seen.append((layer, ids_TK.tolist(), num_experts))
        return np.array(self.computed) if self.computed is not None else None

    def lost(self, layer: int, num_rows: int, reasons: Mapping[int, str]) -> None:
        """Never called: nothing is lost here."""


@pytest.fixture
def remote() -> TwiceTheRows:
    return TwiceTheRows()


@pytest.fixture
def backend(remote: TwiceTheRows) -> TrunkBackend:
    made = TrunkBackend(cast(RemoteExperts, remote), 7)
    made.layer_experts = {LAYER: NUM_EXPERTS}
    return made


def call(backend: TrunkBackend) -> torch.Tensor:
    return backend(LAYER, torch.ones(2, 3), torch.tensor([[0], [3]], dtype=torch.int32), torch.ones(2, 1))


def in_another_thread(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    with ThreadPoolExecutor(1) as other:
        return other.submit(run).result(TIMEOUT_S)


def in_one_thread(*calls: Callable[[], object]) -> None:
    """Runs in a thread that ends, so that its watcher ends with it."""
    with ThreadPoolExecutor(1) as other:
        for run in calls:
            other.submit(run).result(TIMEOUT_S)


def test_calls_go_to_the_experts_of_the_version_that_the_backend_has_then(backend, remote) -> None:
    assert torch.equal(call(backend), torch.full((2, 3), 2.0))
    backend.version = 8
    call(backend)
    assert [(version, on_lost) for _, version, on_lost in remote.asked] == [(7, None), (8, None)]


def test_a_watcher_sees_the_calls_of_its_thread_alone_and_leaves_rows_out(backend, remote) -> None:
    watcher = Watcher([True, False])
    in_one_thread(lambda: backend.watch(watcher), lambda: call(backend))
    call(backend)
    assert watcher.seen == [(LAYER, [[0], [3]], NUM_EXPERTS)]
    (shown_TK, _, on_lost), (unseen_TK, _, nobody) = remote.asked
    assert shown_TK.tolist() == [[0], [NUM_EXPERTS + 1]], "beyond what stands for a dropped assignment"
    assert on_lost == watcher.lost
    assert unseen_TK.tolist() == [[0], [3]] and nobody is None


def test_a_watcher_that_needs_all_rows_changes_none(backend, remote) -> None:
    in_one_thread(lambda: backend.watch(Watcher(None)), lambda: call(backend))
    assert remote.asked[0][0].tolist() == [[0], [3]]


def test_in_a_trial_no_thread_asks_an_expert(backend, remote) -> None:
    with backend.dry():
        assert not call(backend).any() and not in_another_thread(lambda: call(backend)).any()
    assert remote.asked == []
    assert call(backend).all()


def test_a_capture_keeps_the_calls_of_its_thread_alone(backend) -> None:
    with backend.capture() as outer:
        call(backend)
        with backend.capture() as inner:
            call(backend)
        in_another_thread(lambda: call(backend))
    call(backend)
    assert (len(outer), len(inner)) == (1, 1)
    assert torch.equal(outer[0].y_TD, torch.full((2, 3), 2.0)) and outer[0].ids_TK.tolist() == [[0], [3]]


def test_a_block_says_what_its_experts_answered_or_that_it_needs_more_than_rows(backend) -> None:
    class Block(nn.Module):
        def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
            return call(backend)

    class Needy(nn.Module):
        def forward(self, x_BSD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return call(backend)

    y_TD, ids_TK, weights_TK = backend.run(Block(), torch.ones(2, 3))
    assert torch.equal(y_TD, torch.full((2, 3), 2.0))
    assert ids_TK.tolist() == [[0], [3]] and torch.equal(weights_TK, torch.ones(2, 1))
    with pytest.raises(UnsupportedModelError, match=r"a Needy takes more than hidden states: .*positions"):
        backend.run(Needy(), torch.ones(2, 3))

"""Handles rows for which experts returned NaN or infinity: finds the faulty replica, and asks another one."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from moecluster.dispatch.exchange import Answers, Exchange, MakeBatch
from moecluster.dispatch.permute import DispatchPart, dispatch
from moecluster.dispatch.replica_choice import NO_ACTOR, LayerTable
from moecluster.errors import MoeClusterError
from moecluster.metrics import Metrics
from moecluster.moe.experts.finiteness import probe_rows
from moecluster.types import ExpertId, Placement

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """The inputs of a layer's experts. All on the CPU."""

    layer: int
    x_TD: torch.Tensor
    ids_TK: torch.Tensor  # int64
    weights_TK: torch.Tensor  # float32


@dataclass(frozen=True, kw_only=True)
class Mended:
    """Replies with non-finite rows replaced, by zeros where no replica returned finite numbers (lost rows)."""

    answers: Answers
    lost: Mapping[int, str]  # row -> why


MakeBatchOf = Callable[[torch.Tensor], MakeBatch]  # takes the rows x_TD that a part indexes; replies are unsummed


class NonFiniteReplies:
    """The slow path, taken only if a layer's output is not finite. Thread-safe."""

    def __init__(self, exchange: Exchange, metrics: Metrics | None = None) -> None:
        self._exchange = exchange
        self._pool = exchange.pool
        self._metrics = metrics

    def mend(self, asked: LayerRows, answers: Answers, make_batch: MakeBatchOf, timeout_s: float) -> Mended:
        """Asks again for each non-finite pair: first the same replica, then the expert's other replicas.

        Leaves rows alone whose input or gate weights contain NaN or infinity: the experts are not at fault.
        """
        sound_T = _finite_rows(asked.x_TD) & _finite_rows(asked.weights_TK)
        lost: dict[int, str] = {}
        mended = []
        for part, result in answers:
            bad_P = _bad_pairs(part, result.y_ND, result.y_PD) & sound_T[_tokens(part, asked)]
            if not bad_P.any():
                mended.append((part, result))
                continue
            search = _Search(self._exchange, asked, part, make_batch, timeout_s)
            search.run(part.pair_slots_P.numpy()[bad_P])
            for actor, expert in search.sick:
                self._set_aside(search.placement, actor, ExpertId(layer=asked.layer, index=expert))
            lost |= search.lost
            if result.y_PD is not None:
                mended.append((part, replace(result, y_PD=_replaced_pairs(part, result.y_PD, bad_P, search.found))))
            else:
                assert result.y_ND is not None
                mended.append((part, replace(result, y_ND=_replaced_rows(part, result.y_ND, bad_P, search.found))))
        return Mended(answers=mended, lost=lost)

    def _set_aside(self, placement: Placement, actor: str, expert: ExpertId) -> None:
        if self._metrics is not None:
            self._metrics.count_nonfinite_reply(expert, actor)
        if self._pool.set_aside(placement, actor, expert):
            logger.error("expert %s of %s answers NaN or infinity: it is asked no more", expert, actor)


class _Search:
    """Searches finite values for some pairs of one part, asking one candidate replica after the other."""

    def __init__(
        self, exchange: Exchange, asked: LayerRows, part: DispatchPart, make_batch: MakeBatchOf, timeout_s: float
    ) -> None:
        self.placement = exchange.pool.placement(timeout_s)
        self.found: dict[int, torch.Tensor] = {}  # slot -> unweighted row
        self.sick: set[tuple[str, int]] = set()  # (actor, expert)
        self.lost: dict[int, str] = {}  # row -> why
        self._exchange = exchange
        self._asked = asked
        self._make_batch = make_batch
        self._timeout_s = timeout_s
        self._first = part.actor
        self._problems: dict[int, MoeClusterError] = {}  # expert -> why a replica did not answer

    def run(self, slots_S: npt.NDArray[np.int64]) -> None:
        asked = self._asked
        experts_S = asked.ids_TK.numpy().reshape(-1)[slots_S]
        candidates = {int(expert): self._candidates(int(expert)) for expert in np.unique(experts_S)}
        suspects: dict[tuple[str, int], set[int]] = {}  # (actor, expert) -> slots with a non-finite reply
        left_S = slots_S
        while len(left_S) and any(candidates.values()):
            turn = {expert: actors.pop(0) for expert, actors in candidates.items() if actors}
            asked_S = left_S[np.isin(asked.ids_TK.numpy().reshape(-1)[left_S], list(turn))]
            suspects |= self._ask(turn, asked.x_TD, asked.ids_TK, asked.weights_TK, np.sort(asked_S))
            left_S = np.array([slot for slot in left_S if int(slot) not in self.found], dtype=np.int64)
        for (actor, expert), bad in suspects.items():
            # The replica is faulty if another one returns finite values for the same rows, or if it fails on moderate
            # rows.
            if bad & self.found.keys() or not self._bears_probe(actor, expert):
                self.sick.add((actor, expert))
        for slot in left_S:
            self.lost[int(slot) // asked.ids_TK.shape[1]] = self._why(int(asked.ids_TK.view(-1)[slot]))

    def _why(self, expert: int) -> str:
        problem = self._problems.get(expert)
        message = f"; another replica did not answer: {problem}" if problem is not None else ""
        of_all = any(sick == expert for _, sick in self.sick)
        rows = "" if of_all else " for this token's hidden state, though not for others"
        return f"expert {expert} of layer {self._asked.layer} answered NaN or infinity{rows}{message}"

    def _candidates(self, expert: int) -> list[str]:
        """The actor that replied first, then the other actors that hold the expert."""
        wanted = ExpertId(layer=self._asked.layer, index=expert)
        others = {r.actor for r in self.placement.replicas if r.expert == wanted and r.actor in self.placement.actors}
        return [*([self._first] if self._first in self.placement.actors else []), *sorted(others - {self._first})]

    def _ask(
        self,
        turn: Mapping[int, str],
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        slots_S: npt.NDArray[np.int64],
    ) -> dict[tuple[str, int], set[int]]:
        """Asks one actor per expert and keeps finite values. Returns the other replies' slots, by (actor, expert)."""
        table = _table_of(self.placement, self._asked.layer, turn)
        parts = dispatch(table, x_TD, ids_TK, weights_TK, slots_P=slots_S)
        bad: dict[tuple[str, int], set[int]] = {}
        answers = self._exchange.ask(parts, self.placement, self._make_batch(x_TD), self._timeout_s)
        for part, answer in zip(parts, answers, strict=True):
            if isinstance(answer, MoeClusterError):
                self._problems |= dict.fromkeys(part.experts, answer)
                continue
            assert answer.y_PD is not None, "pairs are asked for one by one"
            experts_P = np.repeat(part.experts, part.pair_counts)
            finite_P = _finite_rows(answer.y_PD)
            for slot, expert, is_finite, y_D in zip(
                part.pair_slots_P.tolist(), experts_P.tolist(), finite_P.tolist(), answer.y_PD, strict=True
            ):
                if is_finite:
                    self.found[slot] = y_D
                else:
                    bad.setdefault((part.actor, expert), set()).add(slot)
        return bad

    def _bears_probe(self, actor: str, expert: int) -> bool:
        """Whether the replica returns finite values for moderate rows: then only these rows overflow."""
        x_ND = probe_rows(self._asked.x_TD.shape[1], self._asked.x_TD.dtype)
        ids_N1 = torch.full((len(x_ND), 1), expert)
        ones_N1 = torch.ones(len(x_ND), 1, dtype=torch.float32)
        kept, self.found = self.found, {}
        try:
            return not self._ask({expert: actor}, x_ND, ids_N1, ones_N1, np.arange(len(x_ND)))
        finally:
            self.found = kept


def without_lost_rows(
    y_TD: torch.Tensor, asked: LayerRows, lost: Mapping[int, str]
) -> tuple[torch.Tensor, dict[int, str]]:
    """Returns the layer's output with lost rows set to zeros, and all lost rows, including those whose sum
    overflows."""
    overflown_T = ~_finite_rows(y_TD) & _finite_rows(asked.x_TD) & _finite_rows(asked.weights_TK)
    overflows = (
        f"the sum of the experts of layer {asked.layer} is too large for {str(y_TD.dtype).removeprefix('torch.')}"
    )
    lost = {**dict.fromkeys(np.flatnonzero(overflown_T).tolist(), overflows), **lost}
    if lost:
        y_TD = y_TD.clone()
        y_TD[list(lost)] = 0.0
    return y_TD, lost


def _table_of(placement: Placement, layer: int, turn: Mapping[int, str]) -> LayerTable:
    """A table that places each expert on one actor."""
    actors = tuple(sorted(placement.actors))
    num_experts = placement.layer_experts[layer]
    actor_of_ER = np.full((num_experts, 1), NO_ACTOR, dtype=np.int64)
    for expert, actor in turn.items():
        actor_of_ER[expert, 0] = actors.index(actor)
    return LayerTable(layer=layer, actors=actors, actor_of_ER=actor_of_ER, bound_ER=np.ones((num_experts, 1)))


def _finite_rows(x_ND: torch.Tensor) -> npt.NDArray[np.bool_]:
    finite_N: npt.NDArray[np.bool_] = torch.isfinite(x_ND).all(dim=1).numpy()
    return finite_N


def _tokens(part: DispatchPart, asked: LayerRows) -> npt.NDArray[np.int64]:
    """The token of each pair."""
    tokens_P: npt.NDArray[np.int64] = part.pair_slots_P.numpy() // asked.ids_TK.shape[1]
    return tokens_P


def _bad_pairs(part: DispatchPart, y_ND: torch.Tensor | None, y_PD: torch.Tensor | None) -> npt.NDArray[np.bool_]:
    """Mask of the pairs that are not finite, or belong to a sum that is not."""
    if y_PD is not None:
        return ~_finite_rows(y_PD)
    assert y_ND is not None
    bad_P: npt.NDArray[np.bool_] = ~_finite_rows(y_ND)[part.pair_rows_P.numpy()]
    return bad_P


def _replaced_pairs(
    part: DispatchPart, y_PD: torch.Tensor, bad_P: npt.NDArray[np.bool_], found: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """The pairs with bad ones replaced by the values found, or zeros."""
    y_PD, slots = y_PD.clone(), part.pair_slots_P.tolist()
    for pair in np.flatnonzero(bad_P).tolist():
        y_PD[pair] = found.get(slots[pair], 0.0)
    return y_PD


def _replaced_rows(
    part: DispatchPart, y_ND: torch.Tensor, bad_P: npt.NDArray[np.bool_], found: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """The weighted sums with bad ones recomputed from the values found; pairs without a value count as zeros."""
    y_ND, slots, rows_P = y_ND.clone(), part.pair_slots_P.tolist(), part.pair_rows_P.tolist()
    sums: dict[int, torch.Tensor] = {}
    for pair in np.flatnonzero(bad_P).tolist():
        row = rows_P[pair]
        before = sums.get(row)
        if before is None:
            before = torch.zeros(y_ND.shape[1], dtype=torch.float32)
        y_D = found.get(slots[pair])
        sums[row] = before if y_D is None else before + part.pair_weights_P[pair] * y_D.float()
    for row, y_D in sums.items():
        y_ND[row] = y_D
    return y_ND

"""The best entries so far, while gradients pass by one tensor at a time (released gradients)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from id3_kernels import Entries
from id3_kernels.entries import owners
from id3_kernels.table import candidate_room

from ..distributed.choice import GATHERED, NO_PLACE, best_of
from ..distributed.many_ranks import ManyRanks
from ..heuristics import D3, Heuristic
from ..state.active_set import ActiveSet
from ..state.layout import moved
from ..state.progress import Wanted
from ..state.shard import Shard
from .grad_scaler import SCALED
from .selection import best_of_all, concatenated, entries_at, scored


class Best(NamedTuple):
    """The candidates of a shard, on its device: the best k so far are among them. Padding: 0, -1, 0."""

    score: Tensor  # [capacity]
    place: Tensor  # int64 [capacity]: tensor number << 32 | flat index
    grad: Tensor  # [capacity]
    state: Tensor  # int64, the backend's own

    @classmethod
    def empty(cls, k: int, shard: Shard) -> Best:
        """Room for the best k, none of them found yet."""
        wide = shard.arrays["gradient"]
        capacity, length = candidate_room(shard.device, shard.layout.backend, k) if k else (0, 0)
        place = torch.full((capacity,), -1, dtype=torch.int64, device=shard.device)
        return cls(wide.new_zeros(capacity), place, wide.new_zeros(capacity), place.new_zeros(length))

    def forget(self) -> None:
        self.score.zero_()
        self.place.fill_(-1)
        self.grad.zero_()
        self.state.zero_()


class Candidates:
    """The candidates of every shard for one step, in which at most `wanted` entries join."""

    def __init__(self, wanted: Wanted | None):
        self.wanted = wanted
        self.best: list[Best] = []
        self._k: list[Tensor] = []
        # Of all gradients that entries were chosen by: the candidates are finite, and show no overflow.
        self._largest: list[Tensor] = []

    def cover(self, shards: list[Shard]) -> None:
        """Makes room for the shards that have none yet."""
        for shard in shards[len(self.best) :]:
            self._k.append(torch.zeros(1, dtype=torch.int64, device=shard.device))
            if self.wanted is not None:
                self._k[-1].copy_(moved(self.wanted.k, shard.device))
            capacity = self.wanted.capacity if self.wanted is not None else 0
            self.best.append(Best.empty(min(capacity, shard.numel), shard))
            self._largest.append(shard.arrays["gradient"].new_zeros(1))

    def forget(self) -> None:
        for best in self.best:
            best.forget()

    def tensors(self) -> list[Tensor]:
        """All memory of the candidates."""
        return [tensor for best in self.best for tensor in best]

    def memory(self, i: int) -> list[Tensor]:
        """What was made for shard i."""
        return [*self.best[i], self._k[i], self._largest[i]] if i < len(self.best) else []

    def scaled_tensors(self, heuristic: Heuristic) -> list[Tensor]:
        """What is proportional to the loss scale."""
        held = [best.grad for best in self.best] + self._largest
        return held + ([best.score for best in self.best] if isinstance(heuristic, D3) else [])

    def collect(
        self,
        active: ActiveSet,
        at: tuple[int, int],
        grad: Tensor,
        heuristic: Heuristic,
        add: bool,
        may_hold: bool,
    ) -> None:
        """Takes what a step needs of `grad`, what this rank holds of the gradient of tensor `at`.

        Mutates the candidates and the shard's `gradient` array: the values at active entries become, or with
        `add` grow by, the gradient's. may_hold: entries of this tensor may be candidates already.
        """
        values = active.shards[at[0]].arrays["gradient"]
        self._take(active, at, grad, heuristic, self.best[at[0]], values, add, may_hold)

    def keep(
        self, active: ActiveSet, at: tuple[int, int], grad: Tensor, heuristic: Heuristic, add: bool
    ) -> None:
        """The part of `collect` about active entries: mutates the shard's `gradient` array alone."""
        shard = active.shards[at[0]]
        best = Best.empty(0, shard)
        self._take(active, at, grad, heuristic, best, shard.arrays["gradient"], add, False)

    def search(
        self, active: ActiveSet, at: tuple[int, int], grad: Tensor, heuristic: Heuristic, may_hold: bool
    ) -> None:
        """The part of `collect` about candidates: mutates these alone."""
        unused = torch.empty_like(active.shards[at[0]].arrays["gradient"])
        self._take(active, at, grad, heuristic, self.best[at[0]], unused, False, may_hold)

    def _take(
        self,
        active: ActiveSet,
        at: tuple[int, int],
        grad: Tensor,
        heuristic: Heuristic,
        best: Best,
        values: Tensor,
        add: bool,
        may_hold: bool,
    ) -> None:
        i, j = at
        shard = active.shards[i]
        param = shard.params[j]
        self._look_at(i, grad)
        score, d3 = None, (0.0, 0.0)
        if isinstance(heuristic, D3):
            d3 = heuristic.eps, heuristic.exp
        elif best.score.numel():
            name = active.names[shard.positions[j]] if active.names else None
            score = scored(shard, j, heuristic, grad, name)
            best = Best.empty(0, shard) if score is None else best
        active_entries = shard.offsets[:, j : j + 2], shard.arrays["indices"]
        take = (param, grad, score, *active_entries, values, add, shard.numbers[j] << 32)
        shard.kernels.collect_(*take, *best, self._k[i], may_hold, *d3)

    def collect_part(
        self,
        active: ActiveSet,
        at: tuple[int, int],
        heuristic: D3,
        first: int,
        rows: tuple[Tensor, Tensor],
        held: tuple[Tensor, Tensor, Tensor],
        may_hold: bool,
    ) -> None:
        """Takes candidates from a part of tensor `at` that begins at flat index `first`.

        rows: the parameter's and the gradient's. held: offsets [R, 2] of the active entries in the part,
        indices counted from `first`, and values. Mutates the candidates, and the part's values, which grow
        by the gradient's.
        """
        i, j = at
        param, grad = rows
        self._look_at(i, grad)
        offsets, indices, values = held
        place = (active.shards[i].numbers[j] << 32) + first
        take = (param, grad, None, offsets, indices, values, True, place)
        d3 = heuristic.eps, heuristic.exp
        active.shards[i].kernels.collect_(*take, *self.best[i], self._k[i], may_hold, *d3)

    def _look_at(self, i: int, grad: Tensor) -> None:
        """NaN and infinities of a gradient, a loss scale's overflow, stay in shard i's largest magnitude."""
        if SCALED and self.wanted is not None and grad.numel():
            largest = torch.linalg.vector_norm(grad, torch.inf).to(self._largest[i].dtype)
            torch.maximum(self._largest[i], largest, out=self._largest[i])

    def meet(self, ranks: ManyRanks, bits: int) -> None:
        """Makes the candidates of all ranks, of which no two have the same, those of each: as many as can be
        among the best k of a shard. bits: of a place. Synchronises with a GPU."""
        for i, best in enumerate(self.best):
            place, k = torch.where(best.place < 0, NO_PLACE, best.place), self._k[i]
            if self.wanted.capacity * ranks.size > GATHERED:
                own = ranks.boundary(place, best.score, k, bits).chosen(place, best.score)
            else:
                own = best_of(place, best.score, k)
            columns = {"score": best.score[own], "grad": best.grad[own]}
            place, columns = ranks.whole(place[own], columns, "the choice of entries")
            self.best[i] = Best(columns["score"], place, columns["grad"], best.state)

    def chosen(self, active: ActiveSet, wanted: Wanted) -> tuple[list[Entries], list[Tensor], Tensor, Tensor]:
        """The best entries of each shard and the gradients they were chosen by; their scores, in order of
        place, and how many they are. Does not synchronise with a GPU."""
        shards = active.shards
        if not active.ranks.alone:
            return _chosen_over_ranks(active, self.best, wanted)
        if len(shards) == 1:
            return _chosen_of_one(shards[0], self.best[0], wanted)
        place, score = concatenated([(best.place, best.score) for best in self.best], shards[0].device)
        taken = best_of(place, score, wanted.k)
        place, order = torch.where(taken, place, NO_PLACE).sort()
        score = torch.where(taken, score, 0)[order][: wanted.capacity]
        parts = taken.split([best.score.numel() for best in self.best])
        picked, values = [], []
        for shard, best, part in zip(shards, self.best, parts, strict=True):
            new, order = entries_at(shard, torch.where(moved(part, shard.device), best.place, NO_PLACE))
            n = min(wanted.capacity, shard.numel)
            picked.append(Entries(new.offsets, new.indices[:n]))
            values.append(best.grad[order][:n])
        return picked, values, score, (place < NO_PLACE).sum()


def _chosen_over_ranks(
    active: ActiveSet, best: list[Best], wanted: Wanted
) -> tuple[list[Entries], list[Tensor], Tensor, Tensor]:
    """The same where other ranks have candidates too."""
    found = [(torch.where(b.place < 0, NO_PLACE, b.place), b.score) for b in best]
    place, score, number = best_of_all(active, found, wanted)
    picked, values = [], []
    for shard, own in zip(active.shards, best, strict=True):
        new, _ = entries_at(shard, place)
        picked.append(new)
        values.append(_values_at(shard, new, own))
    return picked, values, score, number


def _values_at(shard: Shard, new: Entries, best: Best) -> Tensor:
    """The gradients of entries that are all among the candidates."""
    owner = owners(new, new.indices.numel())
    place, order = best.place.sort()
    at = torch.searchsorted(place, (shard.number_table[owner] << 32) | new.indices)
    return best.grad[order][at]


def _chosen_of_one(
    shard: Shard, best: Best, wanted: Wanted
) -> tuple[list[Entries], list[Tensor], Tensor, Tensor]:
    """The same for one shard, by a single sort where it holds exactly the best k."""
    n = min(wanted.capacity, shard.numel)
    exact = shard.device.type == "cpu" and best.score.numel() == n
    taken = best.score > 0 if exact else best_of(best.place, best.score, wanted.k)
    new, order = entries_at(shard, torch.where(taken, best.place, NO_PLACE))
    order = order[:n]
    score = torch.where(taken, best.score, 0)[order]
    return [Entries(new.offsets, new.indices[:n])], [best.grad[order]], score, taken.sum()

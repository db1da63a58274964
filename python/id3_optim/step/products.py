"""Weight gradients that never exist whole: a layer's backward pass gives what a step needs of them.

A weight is [rows, columns]. A `Product` stands for dW = LᵀR with L [tokens, rows] and R [tokens, columns]:
for a linear layer the output's gradient and the input, for a transposed weight the other way round. `Rows`
stands for an embedding's dW: row r is the sum of the output's gradient over the tokens whose id is r.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..heuristics import D3
from ..state.active_set import ActiveSet
from ..state.layout import moved
from ..state.shard import Shard
from .candidates import Candidates
from .needed import Needed

# Entries of dW that are alive at once in a step that selects. Smaller products are slower: against whole
# gradients that are released, a step of 120M entries and 512 tokens on two cores takes 11 % longer with 2^18,
# 1 to 3 % with 2^20, and 1 to 2 % with 2^21 or 2^22, by interleaved rounds of one process.
BLOCK_ENTRIES = 1 << 21


class Parts(Protocol):
    """A weight gradient that can be made in parts. complete: every part can be made. needed: the features of
    the input that were kept alone."""

    complete: bool
    needed: Needed | None

    def suffices(self, needed: Needed | None, used: bool) -> bool:
        """Whether `gather` can be called in this step, which looks at the gradient (used) or does not.
        needed: what the weight's active set needs as it is now."""

    def now(self, needed: Needed | None) -> Parts:
        """The same with the places that the active entries have now."""

    def gather(self, shard: Shard, j: int, add: bool) -> None:
        """The shard's `gradient` at the active entries of tensor j becomes dW there, or grows by it with
        `add`. Does not synchronise with a GPU."""

    def blocks(self, param: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, dW of the rows from there, row-major), first rows ascending; rows in none are 0."""

    def whole(self, param: Tensor) -> Tensor:
        """dW."""


@dataclass(frozen=True)
class Product:
    """dW = LᵀR. One of both is None where the input was not kept: the weight has no active entry. needed: its
    features that were kept alone."""

    left: Tensor | None
    right: Tensor | None
    needed: Needed | None = None

    @property
    def complete(self) -> bool:
        return self._kept and self.needed is None

    @property
    def _kept(self) -> bool:
        return self.left is not None and self.right is not None

    def suffices(self, needed: Needed | None, used: bool) -> bool:
        if not self._kept:
            return not used
        return self.needed is None or self.needed.holds(needed)

    def now(self, needed: Needed | None) -> Product:
        return self if self.needed is None else replace(self, needed=needed)

    def gather(self, shard: Shard, j: int, add: bool) -> None:
        if self._kept:
            values = shard.arrays["gradient"]
            indices = self.needed.indices if self.needed else shard.arrays["indices"]
            active = shard.offsets[:, j : j + 2], indices
            shard.kernels.sampled_weight_grad_(self.left, self.right, *active, values, add)

    def blocks(self, param: Tensor) -> Iterator[tuple[int, Tensor]]:
        step = rows_at_once(param)
        for first in range(0, param.shape[0], step):
            yield first, self._of(self.left[:, first : first + step]).to(param.dtype)

    def whole(self, param: Tensor) -> Tensor:
        return self._of(self.left).to(param.dtype)

    def _of(self, left: Tensor) -> Tensor:
        return left.t() @ self.right


@dataclass(frozen=True)
class Rows:
    """An embedding's dW. ids: int64 [tokens]; grads: [tokens, columns]."""

    ids: Tensor
    grads: Tensor
    complete, needed = True, None

    def suffices(self, needed: Needed | None, used: bool) -> bool:
        return True

    def now(self, needed: Needed | None) -> Rows:
        return self

    def gather(self, shard: Shard, j: int, add: bool) -> None:
        values = shard.arrays["gradient"]
        active = shard.offsets[:, j : j + 2], shard.arrays["indices"]
        shard.kernels.sampled_embedding_grad_(self.grads, self.ids, *active, values, add)

    def blocks(self, param: Tensor) -> Iterator[tuple[int, Tensor]]:
        n_rows, step = param.shape[0], rows_at_once(param)
        ids, order = self.ids.sort(stable=True)
        edges = torch.arange(0, n_rows + step, step, device=ids.device)
        edges = torch.searchsorted(ids, edges).tolist()
        for block, (begin, end) in enumerate(pairwise(edges)):
            first = block * step
            if begin < end:
                n = min(step, n_rows - first)
                yield (
                    first,
                    _sum_rows(self.grads[order[begin:end]], ids[begin:end] - first, n).to(param.dtype),
                )

    def whole(self, param: Tensor) -> Tensor:
        return _sum_rows(self.grads, self.ids, param.shape[0]).to(param.dtype)


def _sum_rows(grads: Tensor, ids: Tensor, n_rows: int) -> Tensor:
    """[n_rows, columns]: sums over the tokens of each id, in the order of the tokens."""
    return torch.ops.aten.embedding_dense_backward(grads, ids, n_rows, -1, False)


def rows_at_once(param: Tensor) -> int:
    """How many rows a block has, but perhaps the last."""
    return max(1, BLOCK_ENTRIES // param.shape[1])


def every_block(param: Tensor, blocks: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """(first flat index, the gradient there, flat) of all rows, where `blocks` may leave some out."""
    (n_rows, n_columns), step = param.shape, rows_at_once(param)
    held = next(blocks, None)
    for row in range(0, n_rows, step):
        if held is not None and held[0] == row:
            yield row * n_columns, held[1].reshape(-1)
            held = None  # the next block is made now: two would be alive
            held = next(blocks, None)
        else:
            yield row * n_columns, param.new_zeros(min(step, n_rows - row) * n_columns)


def flat_blocks(gradient: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Likewise of a gradient that is there as a whole."""
    for i, block in enumerate(gradient.reshape(-1).split(BLOCK_ENTRIES)):
        yield i * BLOCK_ENTRIES, block


def collect_blocks(
    candidates: Candidates,
    active: ActiveSet,
    at: tuple[int, int],
    heuristic: D3,
    blocks: Iterator[tuple[int, Tensor]],
    add: bool,
    may_hold: bool,
) -> None:
    """`Candidates.collect` for a gradient of tensor j of shard i, at = (i, j), that comes in blocks of rows.

    Mutates the candidates and the shard's `gradient` array.
    """
    shard, j = active.shards[at[0]], at[1]
    param = shard.params[j].detach()
    step, columns = rows_at_once(param), param.shape[-1]
    held = _Held(shard, j, range(0, param.numel(), step * columns), add)
    for row, block in blocks:
        rows = param[row : row + block.shape[0]], block
        part = held.part(row // step)
        candidates.collect_part(active, at, heuristic, row * columns, rows, part, may_hold)
        del rows, block  # the next block is made now: two would be alive
    held.put_back()


def search(
    candidates: Candidates,
    active: ActiveSet,
    at: tuple[int, int],
    heuristic: D3,
    param: Tensor,
    first: int,
    grad: Tensor,
    may_hold: bool,
) -> None:
    """Takes candidates from a stretch of tensor `at`: grad [n] is the gradient from flat index `first` on.

    param: the tensor, flat. Mutates the candidates alone.
    """
    last = first + grad.numel()
    held = _Held(active.shards[at[0]], at[1], range(first, last, grad.numel()), False)
    rows = param[first:last], grad
    candidates.collect_part(active, at, heuristic, first, rows, held.part(0), may_hold)


class _Held:
    """The active entries of tensor j of a shard in stretches of its flat indices, and their values.

    stretches: their first indices; the last one ends at most a step behind. values: the shard's `gradient`
    (add) or 0, copied: all stretches are looked up at once, since a look at each of a model's blocks takes a
    percent of a step.
    """

    def __init__(self, shard: Shard, j: int, stretches: range, add: bool):
        self._gradient = shard.arrays["gradient"]
        end = min(stretches.start + len(stretches) * stretches.step, shard.params[j].numel())
        self._runs = _runs_within(shard, j, stretches.start, end)
        edges = moved(torch.tensor([*stretches, end], dtype=torch.int32), shard.device)
        indices = _of_runs(shard.arrays["indices"], self._runs)
        firsts = [0, *accumulate(end - begin for begin, end in self._runs)]
        offsets = [torch.searchsorted(indices[first:last], edges) + first for first, last in pairwise(firsts)]
        self._offsets = torch.stack(offsets or [torch.zeros_like(edges, dtype=torch.int64)])
        self._indices = (indices - stretches.start).remainder_(stretches.step)
        values = _of_runs(self._gradient, self._runs)
        self._values = values if add else values.zero_()

    def part(self, stretch: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `Candidates.collect_part` takes a stretch's: offsets, indices counted from its first, values."""
        return self._offsets[:, stretch : stretch + 2], self._indices, self._values

    def put_back(self) -> None:
        """Makes the values the shard's."""
        parts = self._values.split([end - begin for begin, end in self._runs])
        for (begin, end), values in zip(self._runs, parts, strict=True):
            self._gradient[begin:end] = values


def _runs_within(shard: Shard, j: int, first: int, last: int) -> list[tuple[int, int]]:
    """Where the active entries of tensor j in [first, last) lie: in each run that has some."""
    runs = [run[j : j + 2] for run in shard.bounds]
    if (first, last) != (0, shard.params[j].numel()):
        edges = torch.tensor([first, last], dtype=torch.int32, device=shard.device)
        held = [shard.arrays["indices"][begin:end] for begin, end in runs]
        cuts = [torch.searchsorted(indices, edges).tolist() for indices in held]
        runs = [[begin + at for at in cut] for (begin, _), cut in zip(runs, cuts, strict=True)]
    return [(begin, end) for begin, end in runs if begin < end]


def _of_runs(array: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    return torch.cat([array[begin:end] for begin, end in runs] or [array[:0]])

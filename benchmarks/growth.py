"""A run that grows from no active entry to B: its updates and joins over the updates of one that holds B."""

from collections.abc import Callable
from typing import Protocol

import torch

from benchmarks.gate import check_selection
from benchmarks.measure import Timed
from benchmarks.ours import EPS
from benchmarks.parts import KERNELS, Update, wanted
from benchmarks.shapes import Inputs
from id3_kernels import Entries

# The growing run is sampled where |Λ| / B is 1/16, 3/16 … 15/16: the midpoint rule.
POINTS = 8
SHARE = 5_000_000 / 183_831_552
EXP = 1.0


class Join(Protocol):
    """The joins of a window of consecutive steps; their mean is the time of a join.

    A window covers a whole period of the state: where some joins only append and one merges, both count.
    """

    def prepare(self) -> None:
        """Untimed: the state before the window."""

    def run(self) -> None:
        """Timed: every increment of the window, in order."""

    def check(self) -> None:
        """AssertionError where the state after the window is not the sorted union."""


# (the entries held, the window's increments, the backend's functions) → the joins that are timed.
MakeJoin = Callable[[Entries, list[Entries], object], Join]


class ArrayJoin:
    """`join_`: merges each increment at once into flat sorted arrays; moments and originals move too."""

    def __init__(self, held: Entries, increments: list[Entries], kernels):
        self._held, self._increments, self._kernels = held, increments, kernels
        sizes, device = [len(increment.indices) for increment in increments], held.indices.device
        n, self._ends = len(held.indices), []
        for size in sizes:
            self._ends.append(n := n + size)
        self._indices = held.indices.new_empty(n)
        self._beside = [torch.zeros(n, device=device) for _ in range(3)]
        self._originals = [torch.zeros(size, device=device) for size in sizes]
        self._offsets = torch.empty_like(held.offsets)

    def prepare(self) -> None:
        self._indices[: len(self._held.indices)] = self._held.indices
        self._offsets.copy_(self._held.offsets)

    def run(self) -> None:
        for end, increment, originals in zip(self._ends, self._increments, self._originals, strict=True):
            arrays = [array[:end] for array in (self._indices, *self._beside)]
            self._kernels.join_(arrays, self._offsets, *increment, [None, None, originals])

    def check(self) -> None:
        self.prepare()
        self.run()
        parts = zip(self._held.lists(), *(increment.lists() for increment in self._increments), strict=True)
        expected = Entries.from_lists([torch.cat(group).sort().values for group in parts])
        assert torch.equal(self._offsets, expected.offsets), "join_: offsets"
        assert torch.equal(self._indices, expected.indices), "join_: indices"


def _subset(entries: Entries, keep: torch.Tensor) -> Entries:
    counts = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return Entries(counts[entries.offsets], entries.indices[keep])


def _ranked(inputs: Inputs, budget: int, kernels) -> tuple[Entries, torch.Tensor]:
    """The best `budget` entries, and their ranks by score: the order in which a growing run takes them."""
    device = inputs.weights[0].device
    none = Entries.empty(len(inputs.weights), device)
    selected = kernels.select_topk(inputs.weights, inputs.grads, *none, *wanted(budget, device), EPS, EXP)
    entries, scores = Entries(*selected[:2]), selected[2]
    starts = torch.tensor(inputs.starts[:-1], device=device).repeat_interleave(entries.offsets.diff())
    check_selection(inputs, starts.new_empty(0), starts + entries.indices, EXP)
    rank = torch.empty(budget, dtype=torch.int64, device=device)
    rank[scores.argsort(descending=True)] = torch.arange(budget, device=device)
    return entries, rank


def timed_growth(
    inputs: Inputs,
    increment: int,
    kernels=KERNELS,
    share: float = SHARE,
    make_join: MakeJoin = ArrayJoin,
    window: int = 1,
) -> tuple[dict[str, Timed], int]:
    """`static`: the update at B; `update_i`, `join_i`: those along the growing run. And B.

    window: joins in one timed run; one where every join costs the same.
    """
    budget = int(share * inputs.n_entries)
    entries, rank = _ranked(inputs, budget, kernels)
    weights = [weight.clone() for weight in inputs.weights]
    timed = {"static": Timed(Update(weights, inputs.grads, entries, kernels).run)}
    for point in range(POINTS):
        size = (2 * point + 1) * budget // (2 * POINTS)
        held = _subset(entries, rank < size)
        starts = range(size, size + window * increment, increment)
        increments = [_subset(entries, (rank >= at) & (rank < at + increment)) for at in starts]
        join = make_join(held, increments, kernels)
        join.check()
        timed[f"update_{point}"] = Timed(Update(weights, inputs.grads, held, kernels).run)
        timed[f"join_{point}"] = Timed(join.run, join.prepare, per_run=window)
    return timed, budget

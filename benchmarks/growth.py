"""The update time summed over a run: a set that grows from nothing to B, against one that holds B at once."""

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


class Join:
    """One increment's entries put into a set of sorted entries and the arrays beside it."""

    def __init__(self, held: Entries, joining: Entries, kernels=KERNELS):
        self._held, self._joining, self._kernels = held, joining, kernels
        n, k = len(held.indices), len(joining.indices)
        self._indices = held.indices.new_empty(n + k)
        # Both moments and the original values, as the optimizer keeps them.
        self._beside = [torch.zeros(n + k, device=held.indices.device) for _ in range(3)]
        self._originals = torch.zeros(k, device=held.indices.device)
        self._offsets = torch.empty_like(held.offsets)

    def prepare(self) -> None:
        self._indices[: len(self._held.indices)] = self._held.indices
        self._offsets.copy_(self._held.offsets)

    def run(self) -> None:
        arrays, first = [self._indices, *self._beside], [None, None, self._originals]
        self._kernels.join_(arrays, self._offsets, *self._joining, first)

    def check(self) -> None:
        self.prepare()
        self.run()
        parts = zip(self._held.lists(), self._joining.lists(), strict=True)
        expected = Entries.from_lists([torch.cat(pair).sort().values for pair in parts])
        assert torch.equal(self._offsets, expected.offsets), "join_: offsets"
        assert torch.equal(self._indices, expected.indices), "join_: indices"


def _subset(entries: Entries, keep: torch.Tensor) -> Entries:
    counts = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return Entries(counts[entries.offsets], entries.indices[keep])


def timed_growth(
    inputs: Inputs, increment: int, kernels=KERNELS, share: float = SHARE
) -> tuple[dict[str, Timed], int]:
    """`static`: the update at B; `update_i`, `join_i`: those along the growing run. And B."""
    budget, device = int(share * inputs.n_entries), inputs.weights[0].device
    none = Entries.empty(len(inputs.weights), device)
    selected = kernels.select_topk(inputs.weights, inputs.grads, *none, *wanted(budget, device), EPS, EXP)
    entries, scores = Entries(*selected[:2]), selected[2]
    starts = torch.tensor(inputs.starts[:-1], device=device).repeat_interleave(entries.offsets.diff())
    check_selection(inputs, starts.new_empty(0), starts + entries.indices, EXP)
    weights = [weight.clone() for weight in inputs.weights]
    rank = torch.empty(budget, dtype=torch.int64, device=device)
    rank[scores.argsort(descending=True)] = torch.arange(budget, device=device)
    timed = {"static": Timed(Update(weights, inputs.grads, entries, kernels).run)}
    for point in range(POINTS):
        size = (2 * point + 1) * budget // (2 * POINTS)
        held = _subset(entries, rank < size)
        join = Join(held, _subset(entries, (rank >= size) & (rank < size + increment)), kernels)
        join.check()
        timed[f"update_{point}"] = Timed(Update(weights, inputs.grads, held, kernels).run)
        timed[f"join_{point}"] = Timed(join.run, join.prepare)
    return timed, budget

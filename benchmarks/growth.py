"""A run that grows from no active entry to B: its updates and joins over the updates of one that holds B."""

import torch

from benchmarks.gate import check_selection
from benchmarks.measure import Timed
from benchmarks.ours import EPS
from benchmarks.parts import KERNELS, Update, wanted
from benchmarks.shapes import Inputs
from id3_kernels import Entries
from id3_optim.param_groups import Member, in_pieces
from id3_optim.state.layout import Layout
from id3_optim.state.shard import RECENT_SHARE, Shard

# The growing run is sampled where |Λ| / B is 1/16, 3/16 … 15/16: the midpoint rule.
POINTS = 8
SHARE = 5_000_000 / 183_831_552
EXP = 1.0


class Joins:
    """A window of consecutive joins into the optimizer's own state; their mean is the time of a join.

    The window holds a whole period of the state: joins into the recent run until it is full, and its merge.
    """

    def __init__(
        self, weights: list[torch.Tensor], held: Entries, increments: list[Entries], budget: int, kernels
    ):
        self._held, self._increments = held, increments
        self._shard = Shard(weights[0].device, weights[0].dtype, Layout(True, False, False, None))
        self._shard.kernels = kernels
        members = (Member(position, 0, weight) for position, weight in enumerate(weights))
        self._shard.extend(list(in_pieces(members, 0)))
        self._shard.limit = budget
        self._shard.reserve(budget)
        for array in self._shard.arrays.values():
            array.zero_()

    def prepare(self) -> None:
        """Untimed: the state before the window."""
        n = len(self._held.indices)
        self._shard.hold(self._held.offsets.clone(), n, {})
        self._shard.arrays["indices"][:n] = self._held.indices

    def run(self) -> None:
        for increment in self._increments:
            self._shard.join(increment, None, self._shard.limit)

    def check(self) -> None:
        """AssertionError where the state after the window is not the sorted union, merged once at least."""
        self.prepare()
        self.run()
        recent = self._shard.offsets[-1].diff().sum() if len(self._shard.offsets) > 1 else 0
        assert recent <= max(len(self._increments) - 1, 0) * len(self._increments[0].indices), "no merge"
        parts = zip(self._held.lists(), *(increment.lists() for increment in self._increments), strict=True)
        self._shard.settle()
        for j, (group, joined) in enumerate(zip(parts, self._shard.runs()[0].lists(), strict=True)):
            assert torch.equal(joined, torch.cat(group).sort().values), f"join: tensor {j}"


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
    inputs: Inputs, increment: int, kernels=KERNELS, share: float = SHARE
) -> tuple[dict[str, Timed], int]:
    """`static`: the update at B; `update_i`, `join_i`: those along the growing run. And B."""
    budget = int(share * inputs.n_entries)
    window = budget // RECENT_SHARE // increment + 1
    entries, rank = _ranked(inputs, budget, kernels)
    weights = [weight.clone() for weight in inputs.weights]
    timed = {"static": Timed(Update(weights, inputs.grads, entries, kernels).run)}
    for point in range(POINTS):
        size = (2 * point + 1) * budget // (2 * POINTS)
        held = _subset(entries, rank < size)
        starts = range(size, size + window * increment, increment)
        increments = [_subset(entries, (rank >= at) & (rank < at + increment)) for at in starts]
        joins = Joins(weights, held, increments, budget, kernels)
        joins.check()
        timed[f"update_{point}"] = Timed(Update(weights, inputs.grads, held, kernels).run)
        timed[f"join_{point}"] = Timed(joins.run, joins.prepare, per_run=window)
    return timed, budget

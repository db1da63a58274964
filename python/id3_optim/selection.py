"""Which entries join: the exact best k over all shards, by any heuristic. Nothing here asks a GPU.

Lists are as long as their capacity, since how many entries there are is known on the device alone. Where
several shards or tensors have to be compared, an entry is a `place`: tensor position << 32 | flat index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from id3_kernels import Entries

from .heuristics import D3, Heuristic, scores
from .progress import Wanted
from .state import Shard, moved

NOBODY = 1 << 62  # behind every place


@dataclass(frozen=True)
class Selection:
    """What the newest selection did. Everything here waits for a GPU, which is why no step asks.

    padded: [capacity] scores in entry order, of which the first `number` (int64, one element) joined.
    """

    at: int | Tensor
    padded: Tensor
    number: Tensor

    @property
    def step(self) -> int:
        return int(self.at)

    @property
    def count(self) -> int:
        return int(self.number)

    @property
    def scores(self) -> Tensor:
        return self.padded[: self.count]

    @property
    def threshold(self) -> float | None:
        """The smallest score, None if nothing joined."""
        return self.scores.min().item() if self.count else None


def select(
    shards: list[Shard],
    grads: list[list[Tensor | None]],
    heuristic: Heuristic,
    wanted: Wanted,
    names: list[str] | None,
    fresh: bool,
) -> tuple[list[Entries], Tensor, Tensor]:
    """The best entries outside the active sets (`fresh`: of all), as one Entries per shard.

    Also gives their scores in entry order and how many there are. Ties go to the lowest (position, index).
    """
    if isinstance(heuristic, D3) and len(shards) == 1:
        offsets, indices, score = _by_d3(shards[0], grads[0], heuristic, wanted, fresh)
        return [Entries(offsets, indices)], score, offsets[-1]
    found = []
    for shard, g in zip(shards, grads, strict=True):
        here = Wanted(moved(wanted.k, shard.device), wanted.capacity)
        if isinstance(heuristic, D3):
            found.append(_placed(shard, *_by_d3(shard, g, heuristic, here, fresh)))
        else:
            found.append(_by_scores(shard, g, heuristic, here, names, fresh))
    place, score = _best(gathered(found, shards[0].device), wanted)
    return [entries_at(shard, place)[0] for shard in shards], score, (place < NOBODY).sum()


def best_of(place: Tensor, score: Tensor, k: Tensor) -> Tensor:
    """bool [n]: whether an entry is among the k of largest score above 0; ties go to the lowest place."""
    by_place = place.argsort()
    order = by_place[score[by_place].argsort(descending=True, stable=True)]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return (rank < k) & (score > 0)


def gathered(found: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """All places and scores (float64 where dtypes differ) in one list each, on `device`."""
    place, score = ([moved(x, device) for x in column] for column in zip(*found, strict=True))
    if len({s.dtype for s in score}) > 1:
        score = [s.double() for s in score]
    return torch.cat(place), torch.cat(score)


def entries_at(shard: Shard, place: Tensor) -> tuple[Entries, Tensor]:
    """Those of the places that lie in the shard, as its entries, and where each of them stands in `place`."""
    place = moved(place, shard.device)
    positions = shard.position_table
    owner = torch.searchsorted(positions, place >> 32).clamp_(max=positions.numel() - 1)
    here = positions[owner] == place >> 32
    ordered, order = torch.where(here, (owner << 32) | (place & 0xFFFFFFFF), NOBODY).sort()
    edges = torch.arange(positions.numel() + 1, device=shard.device) << 32
    return Entries(torch.searchsorted(ordered, edges), (ordered & 0xFFFFFFFF).to(torch.int32)), order


def _active(shard: Shard, fresh: bool) -> Entries:
    return Entries.empty(len(shard.params), shard.device) if fresh else shard.active


def _by_d3(shard: Shard, grads: list, heuristic: D3, wanted: Wanted, fresh: bool):
    capacity = min(wanted.capacity, shard.numel)
    return shard.kernels.select_topk(
        shard.params, grads, *_active(shard, fresh), wanted.k, capacity, heuristic.eps, heuristic.exp
    )


def _placed(shard: Shard, offsets: Tensor, indices: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The places and scores of a result of the kernels; NOBODY and 0 behind its last entry."""
    at = torch.arange(indices.numel(), device=shard.device)
    owner = torch.searchsorted(offsets[1:], at, right=True).clamp_(max=len(shard.params) - 1)
    held = at < offsets[-1]
    place = torch.where(held, (shard.position_table[owner] << 32) | indices, NOBODY)
    return place, torch.where(held, score, 0)


def _by_scores(shard: Shard, grads: list, heuristic: Heuristic, wanted: Wanted, names, fresh: bool):
    """Tensor by tensor, so that no more than one tensor's scores and O(k) candidates are alive."""
    offsets, indices = _active(shard, fresh)
    best = None
    for j, (param, position) in enumerate(zip(shard.params, shard.positions, strict=True)):
        score = scores(heuristic, param, grads[j], position, names[position] if names else None)
        if score is None:
            continue
        ends, index, value = shard.kernels.select_topk_by_score(
            [score], offsets[j : j + 2], indices, wanted.k, min(wanted.capacity, param.numel())
        )
        held = torch.arange(index.numel(), device=shard.device) < ends[-1]
        here = torch.where(held, (position << 32) | index.long(), NOBODY), torch.where(held, value, 0)
        best = here if best is None else _best(gathered([best, here], shard.device), wanted)
    if best is None:
        none = torch.zeros(0, dtype=torch.int64, device=shard.device)
        return none, none.float()
    return best


def _best(found: tuple[Tensor, Tensor], wanted: Wanted) -> tuple[Tensor, Tensor]:
    """The best k by score, in order of place; NOBODY and 0 behind them."""
    place, score = found
    taken = best_of(place, score, wanted.k)
    place, order = torch.where(taken, place, NOBODY).sort()
    return place[: wanted.capacity], torch.where(taken, score, 0)[order][: wanted.capacity]

"""Chooses the entries that join: the k of the largest score over all shards. Nothing synchronises with a GPU.

Lists have the length of their capacity and end in padding, since the number of entries is known on the device
alone. Where shards or tensors are compared, an entry is a `place`: tensor number << 32 | flat index; over
ranks, an index into the whole tensor, below which a shard's `index_bits` lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from id3_kernels import Entries

from ..distributed.choice import GATHERED, NO_PLACE, best
from ..heuristics import D3, Heuristic, scores
from ..state.active_set import ActiveSet
from ..state.layout import moved
from ..state.progress import Wanted
from ..state.shard import Shard
from .gradients import Whole

# Candidates of several tensors are merged when they are more than this many times k: with a merge after each
# tensor a selection takes a fifth to a third longer (95 tensors, k = 1,600).
MERGED_AT = 8


@dataclass(frozen=True)
class Selection:
    """What the newest selection did. Every property synchronises with a GPU, so no step reads one.

    padded: [capacity] scores in entry order, of which the first `number` (int64, one element) joined. Where
    ranks have more than 2^14 candidates together, padded holds this rank's scores alone.
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
        return self.scores.min().item() if self.scores.numel() else None


def select(
    active: ActiveSet,
    gradients: list[Whole],
    heuristic: Heuristic,
    wanted: Wanted,
    per_tensor: int | None = None,
) -> tuple[list[Entries], list[None], Tensor, Tensor]:
    """The best entries outside the active set, with the strategy "repeat" of all entries.

    per_tensor: the most entries of one tensor that may be active; None for no limit.
    Returns them as one Entries per shard, no gradients beside them (the shards' gradients are whole), their
    scores in entry order, and how many they are. Ties go to the lowest place.
    """
    shards, fresh = active.shards, active.layout.repeat
    no_values = [None for _ in shards]
    at_once = isinstance(heuristic, D3) and per_tensor is None
    if at_once and len(shards) == 1 and active.ranks.alone:
        offsets, indices, score = _by_d3(shards[0], gradients[0], heuristic, wanted, fresh)
        return [Entries(offsets, indices)], no_values, score, offsets[-1]
    found = []
    for shard, whole in zip(shards, gradients, strict=True):
        local = wanted._replace(k=moved(wanted.k, shard.device))
        if at_once:
            found.append(_placed(shard, *_by_d3(shard, whole, heuristic, local, fresh)))
        else:
            names = active.names or [None] * (1 + max(shard.positions))
            found.append(_by_tensor(shard, whole, heuristic, local, names, fresh, per_tensor))
    place, score, number = best_of_all(active, found, wanted)
    picked = [entries_at(shard, place)[0] for shard in shards]
    return picked, no_values, score, number


def best_of_all(
    active: ActiveSet, found: Sequence[tuple[Tensor, Tensor]], wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """The best k of all shards and ranks: places and scores in order of place, padded; how many they are.

    found: for each shard places and scores; padding has NO_PLACE and 0. Over ranks, which all find the same,
    what comes out are places in whole tensors; where k is large, those of this rank alone.
    """
    home, (k, capacity) = active.shards[0].device, wanted[:2]
    if not active.ranks.alone:
        rows = [_over_ranks(shard, *own) for shard, own in zip(active.shards, found, strict=True)]
        columns = ([moved(x, home) for x in column] for column in zip(*rows, strict=True))
        place, score, offered = map(torch.cat, columns)
        if capacity * active.ranks.size > GATHERED:
            return _by_boundary(active, place, score, offered, k)
        own = best(torch.where(offered, place, NO_PLACE), torch.where(offered, score, 0), k, capacity)
        found = [active.ranks.gather(*own, capacity)]
    place, score = best(*concatenated(found, home), k, capacity)
    return place, score, (place < NO_PLACE).sum()


def _by_boundary(
    active: ActiveSet, place: Tensor, score: Tensor, offered: Tensor, k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a large k, of this rank's entries alone. Synchronises with a GPU."""
    bits = active.shards[0].index_bits + active.n_numbers.bit_length()
    boundary = active.ranks.boundary(place, torch.where(offered, score, 0), k, bits)
    own = boundary.chosen(place, score)
    place, order = place[own].sort()
    return place, score[own][order], boundary.number


def _over_ranks(shard: Shard, place: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(places in the whole tensors, scores, bool: whether no other rank offers the entry)."""
    owner = torch.searchsorted(shard.number_table, place >> 32).clamp_(max=shard.number_table.numel() - 1)
    index = shard.blocks.whole_index(owner, place & 0xFFFFFFFF)
    held, whole = place < NO_PLACE, (place >> 32 << shard.index_bits) | index
    return torch.where(held, whole, NO_PLACE), score, held & shard.blocks.first[owner]


def concatenated(found: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """All places and scores (float64 where dtypes differ) in one list each, on `device`."""
    place, score = ([moved(x, device) for x in column] for column in zip(*found, strict=True))
    if len({s.dtype for s in score}) > 1:
        score = [s.double() for s in score]
    return torch.cat(place), torch.cat(score)


def entries_at(shard: Shard, place: Tensor) -> tuple[Entries, Tensor]:
    """Those places that lie in the shard, as its entries, and the position of each of them in `place`."""
    place, bits = moved(place, shard.device), shard.index_bits
    numbers, number = shard.number_table, place >> bits
    owner = torch.searchsorted(numbers, number).clamp_(max=numbers.numel() - 1)
    inside, index = numbers[owner] == number, place & ((1 << bits) - 1)
    if shard.blocks is not None:
        index, held = shard.blocks.local_index(owner, index)
        inside = inside & held
    ordered, order = torch.where(inside, (owner << 32) | index, NO_PLACE).sort()
    edges = torch.arange(numbers.numel() + 1, device=shard.device) << 32
    found = Entries(torch.searchsorted(ordered, edges), (ordered & 0xFFFFFFFF).to(torch.int32))
    # A rank gets a share of the places: its arrays are to grow by no more.
    return found if shard.blocks is None else found.trimmed(), order


def _active(shard: Shard, fresh: bool) -> tuple[Tensor, Tensor]:
    """The offsets and indices of the active set, as the ops take them."""
    return (
        Entries.empty(len(shard.params), shard.device) if fresh else (shard.offsets, shard.arrays["indices"])
    )


def _by_d3(shard: Shard, gradients: Whole, heuristic: D3, wanted: Wanted, fresh: bool):
    capacity = min(wanted.capacity, shard.numel)
    return shard.kernels.select_topk(
        shard.params,
        gradients.tensors,
        *_active(shard, fresh),
        wanted.k,
        capacity,
        heuristic.eps,
        heuristic.exp,
    )


def _placed(shard: Shard, offsets: Tensor, indices: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The places and scores of a result of the kernels; NO_PLACE and 0 as padding."""
    at = torch.arange(indices.numel(), device=shard.device)
    owner = torch.searchsorted(offsets[1:], at, right=True).clamp_(max=len(shard.params) - 1)
    held = at < offsets[-1]
    place = torch.where(held, (shard.number_table[owner] << 32) | indices, NO_PLACE)
    return place, torch.where(held, score, 0)


def scored(
    shard: Shard, j: int, heuristic: Heuristic, grad: Tensor | None, name: str | None
) -> Tensor | None:
    """`heuristics.scores` of tensor j."""
    owner, rows = shard.owners[j], shard.ranges[j]
    return scores(heuristic, shard.params[j], grad, shard.positions[j], name, owner, rows)


def _by_tensor(
    shard: Shard,
    gradients: Whole,
    heuristic: Heuristic,
    wanted: Wanted,
    names: list[str | None],
    fresh: bool,
    per_tensor: int | None,
) -> tuple[Tensor, Tensor]:
    """Tensor by tensor, so that no more than one tensor's scores and O(k) candidates are alive."""
    offsets, indices = _active(shard, fresh)
    nothing = torch.zeros(0, dtype=torch.int64, device=shard.device)
    kept = [(nothing, nothing.to(shard.arrays["exp_avg"].dtype))]
    for j, (param, number) in enumerate(zip(shard.params, shard.numbers, strict=True)):
        own, grad, k, capacity = offsets[..., j : j + 2], gradients.tensors[j], *wanted[:2]
        if per_tensor is not None:
            held = (own[..., 1] - own[..., 0]).sum()
            k, capacity = torch.minimum(k, (per_tensor - held).clamp(min=0)), min(capacity, per_tensor)
        room = k, min(capacity, param.numel())
        if grad is None:
            continue
        if isinstance(heuristic, D3):
            numbers = heuristic.eps, heuristic.exp
            ends, index, value = shard.kernels.select_topk([param], [grad], own, indices, *room, *numbers)
        else:
            score = scored(shard, j, heuristic, grad, names[shard.positions[j]])
            if score is None:
                continue
            ends, index, value = shard.kernels.select_topk_by_score([score], own, indices, *room)
        held = torch.arange(index.numel(), device=shard.device) < ends[-1]
        found = torch.where(held, (number << 32) | index.long(), NO_PLACE), torch.where(held, value, 0)
        kept.append(found)
        if sum(place.numel() for place, _ in kept) > MERGED_AT * wanted.capacity:
            kept = [best(*concatenated(kept, shard.device), *wanted[:2])]
    return concatenated(kept, shard.device)

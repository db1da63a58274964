"""A shard's entries over all ranks: every rank gives those that it speaks for, and gets all."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from id3_kernels import Entries
from id3_kernels.entries import owners

from ..distributed.many_ranks import ManyRanks
from ..pieces import index_dtype
from .shard import Shard


def over_ranks(
    ranks: ManyRanks, shard: Shard, entries: Entries, columns: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    """For each tensor of the shard `indices` into the whole tensor, ascending, and the columns beside them.

    entries: this rank's, of n entries; columns: [n] each. Every rank has to call this.
    """
    n = int(entries.offsets[-1])
    owner, bits = owners(entries, n), shard.index_bits
    place = (owner << bits) | shard.blocks.whole_index(owner, entries.indices[:n])
    own = shard.blocks.first[owner]
    place, found = ranks.whole(place[own], {name: column[:n][own] for name, column in columns.items()})
    edges = torch.searchsorted(place, torch.arange(len(shard.params) + 1, device=shard.device) << bits)
    rows = cut(Entries(edges, place & ((1 << bits) - 1)), found)
    return [
        {**row, "indices": row["indices"].to(index_dtype(p))}
        for row, p in zip(rows, shard.owners, strict=True)
    ]


def cut(entries: Entries, columns: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """For each tensor its `indices` and its part of the columns: views."""
    bounds = entries.offsets.tolist()
    sizes = [end - begin for begin, end in pairwise(bounds)]
    named = {"indices": entries.indices, **columns}
    parts = [column[: bounds[-1]].split(sizes) for column in named.values()]
    return [dict(zip(named, row, strict=True)) for row in zip(*parts, strict=True)]


def own_part(shard: Shard, j: int, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Of ascending flat indices into the whole of tensor j: (those that this rank holds, as int32 indices
    into its part; bool, which they are)."""
    index = indices.to(shard.device, torch.int64)
    found, inside = shard.blocks.local_index(torch.full_like(index, j), index)
    return found[inside].to(torch.int32), inside

"""Entries of parameters that ranks hold parts of: each reads and writes its own; no weight is gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from id3_kernels.hashing import bits

from ..distributed.blocks import Blocks
from ..distributed.many_ranks import ranks_of
from ..distributed.part import local, part_of

Row = tuple[
    Tensor, Tensor
]  # a DTensor and flat indices into the whole of it, int32 [n], the same on all ranks


def read_split(rows: Sequence[Row]) -> list[Tensor]:
    """The values at the entries of each row, on all ranks, each of which has to call this.

    Sends 8 bytes per entry: each rank adds the bits of its own entries to zeros.
    """
    if not rows:
        return []
    ranks, found = ranks_of(("", param) for param, _ in rows), []
    for param, indices in rows:
        own, inside = _own(param, indices)
        values = torch.zeros(indices.numel(), dtype=torch.int64, device=own.device)
        if ranks.alone or ranks.speaks_for(param):
            values[inside] = bits(local(param).detach().reshape(-1)[own]).long()
        found.append(values)
    home = found[0].device
    total = torch.cat([values.to(home) for values in found])
    if not ranks.alone:
        total = ranks.total(total, "the values of a delta")
    parts = total.split([values.numel() for values in found])
    return [_values(part, param) for part, (param, _) in zip(parts, rows, strict=True)]


def write_split(param: Tensor, indices: Tensor, values: Tensor) -> None:
    """Puts values of entries, the same on all ranks, into what this rank holds of a parameter."""
    own, inside = _own(param, indices)
    held = local(param)
    at = torch.unravel_index(own, held.shape)
    held[at] = values.to(held.device, held.dtype)[inside]
    torch.autograd.graph.increment_version([param])


def _own(param: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(flat indices into what this rank holds, bool [n]: which entries they are)."""
    device = local(param).device
    index = indices.to(device, torch.int64)
    found, inside = Blocks([part_of(param)], [True], device).local_index(torch.zeros_like(index), index)
    return found[inside], inside


def _values(pattern: Tensor, param: Tensor) -> Tensor:
    empty = bits(local(param).detach().new_empty(0))
    return pattern.to(empty.dtype).view(param.dtype).to(local(param).device)

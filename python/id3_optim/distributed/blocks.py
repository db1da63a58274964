"""Where the parts of many tensors lie in the whole tensors: local flat indices to global ones, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .part import EVERYTHING, Part


class Blocks:
    """The parts of a shard's tensors as tables, so that one call maps entries of all tensors.

    first: bool [M], whether this rank speaks for the tensor where several ranks hold the same part of it.
    """

    def __init__(self, parts: Sequence[Part], first: Sequence[bool], device: torch.device):
        depth = max((len(part.levels) for part in parts), default=0)
        rows = [(*part.levels, *[EVERYTHING] * (depth - len(part.levels))) for part in parts]
        table = torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(parts), depth, 4)
        self._levels = [level.unbind(-1) for level in table.unbind(1)]
        self.first = torch.tensor(first, dtype=torch.bool, device=device)

    def whole_index(self, owner: Tensor, index: Tensor) -> Tensor:
        """int64: the flat index in the whole tensor. owner: the number of the tensor of each local index."""
        index, found = index.long(), 0
        for whole, begin, _, local in self._levels:
            size = local[owner].clamp(min=1)  # a part without entries has none to map
            found = found + index // size * whole[owner] + begin[owner]
            index = index % size
        return found + index

    def local_index(self, owner: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(int64, bool): the flat index in this rank's part, and whether the entry lies in that part."""
        found, inside = 0, torch.ones_like(index, dtype=torch.bool)
        for whole, begin, span, local in self._levels:
            size = whole[owner].clamp(min=1)
            found = found + index // size * local[owner]
            index = index % size - begin[owner]
            inside = inside & (index >= 0) & (index < span[owner])
        return torch.where(inside, found + index, 0), inside

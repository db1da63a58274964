"""The features of a layer's input that the gradient at active entries needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..state.shard import Shard

# Of more features than this part all are kept: another operation often holds the input anyway, and a copy of
# most of it would take memory beside it.
MOST = 0.75


@dataclass(frozen=True)
class Needed:
    """features: int32 [n], ascending, those that entries of a weight use, along its dimension `dim`. indices:
    int32, beside the shard's `indices`: flat indices of the weight's entries in a weight that has these
    features alone. They hold until the shard's arrays are put in another order."""

    dim: int
    features: Tensor
    indices: Tensor

    def holds(self, now: Needed | None) -> bool:
        """Whether these are the features that the weight's active set, as it is `now`, needs."""
        return now is not None and self.dim == now.dim and torch.equal(self.features, now.features)


class NeededFeatures:
    """`Needed` for each weight, found once after each change of the active set."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, int], tuple[list[list[int]], Needed | None]] = {}
        self._indices: dict[tuple[int, int], Tensor] = {}

    def of(self, shard: Shard, at: tuple[int, int], dim: int) -> Needed | None:
        """For the weight `at` (shard, tensor), whose dimension `dim` are the features; None: all of them."""
        bounds = shard.bounds
        place = (*at, dim)
        known = self._found.get(place)
        if known is None or known[0] is not bounds:
            known = self._found[place] = bounds, self._find(shard, at, dim)
        return known[1]

    def _find(self, shard: Shard, at: tuple[int, int], dim: int) -> Needed | None:
        i, j = at
        stretches = [slice(*run[j : j + 2]) for run in shard.bounds]
        flat = torch.cat([shard.arrays["indices"][stretch] for stretch in stretches])
        shape = shard.params[j].shape
        place = [flat // shape[1], flat % shape[1]]
        used = torch.zeros(shape[dim], dtype=torch.bool, device=flat.device).index_fill_(
            0, place[dim].long(), True
        )
        features = used.nonzero().flatten().to(torch.int32)
        if features.numel() > MOST * shape[dim]:
            return None
        place[dim] = (used.cumsum(0).to(torch.int32) - 1)[place[dim].long()]
        row, column = place
        renumbered = row * (features.numel() if dim == 1 else shape[1]) + column
        indices, lengths = self._beside(shard, (i, dim)), [s.stop - s.start for s in stretches]
        for stretch, part in zip(stretches, renumbered.split(lengths), strict=True):
            indices[stretch] = part
        return Needed(dim, features, indices)

    def tensors(self) -> list[Tensor]:
        """All memory of what was found."""
        found = (needed.features for _, needed in self._found.values() if needed is not None)
        return [*self._indices.values(), *found]

    def _beside(self, shard: Shard, key: tuple[int, int]) -> Tensor:
        """An array beside the shard's `indices`, which all its weights of one layout share. key: the number
        of the shard, and the dimension of the features."""
        own = shard.arrays["indices"]
        if key not in self._indices or self._indices[key].numel() != own.numel():
            self._indices[key] = torch.empty_like(own)
        return self._indices[key]

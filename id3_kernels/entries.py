"""A set of entries (single numbers) in a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 256  # neighbouring entries of one tensor, of whose scores a selection keeps the maximum; as in csrc


class Entries(NamedTuple):
    """Entries of M tensors: tensor j owns `indices[offsets[j]:offsets[j + 1]]`.

    offsets: int64 [M + 1], from 0, non-decreasing. indices: int32 [n], the flat row-major index inside
    the tensor (`t.reshape(-1)`, whatever the strides), ascending and unique within a tensor. `indices`
    may be longer than `offsets[-1]`; the rest is padding.
    """

    offsets: Tensor
    indices: Tensor

    @classmethod
    def empty(cls, n_tensors: int, device: torch.device | str = "cpu") -> Entries:
        """No entry in any of `n_tensors` tensors."""
        offsets = torch.zeros(n_tensors + 1, dtype=torch.int64, device=device)
        return cls(offsets, torch.empty(0, dtype=torch.int32, device=device))

    @classmethod
    def from_lists(
        cls, indices: Sequence[Tensor | Sequence[int]], device: torch.device | str = "cpu"
    ) -> Entries:
        """One list or 1-D tensor of ascending flat indices per tensor."""
        rows = [torch.as_tensor(row, device=device).to(torch.int32).reshape(-1) for row in indices]
        counts = torch.tensor([0] + [row.numel() for row in rows], dtype=torch.int64)
        return cls(counts.cumsum(0).to(device), torch.cat(rows) if rows else cls.empty(0, device).indices)

    def of(self, j: int) -> Tensor:
        """The flat indices in tensor j, int32. Synchronises where the entries are on a GPU."""
        begin, end = self.offsets[j : j + 2].tolist()
        return self.indices[begin:end]

    def lists(self) -> list[Tensor]:
        """The flat indices per tensor, int32 each. Synchronises where the entries are on a GPU."""
        bounds = self.offsets.tolist()
        return [self.indices[b:e] for b, e in pairwise(bounds)]

    def trimmed(self) -> Entries:
        """The same entries without padding. Synchronises where the entries are on a GPU."""
        return Entries(self.offsets, self.indices[: int(self.offsets[-1])])


def runs(offsets: Tensor) -> list[Tensor]:
    """The rows [M + 1] of offsets [R, M + 1]; of [M + 1] that row alone."""
    return list(offsets) if offsets.dim() == 2 else [offsets]


def owners(entries: Entries, n: int) -> Tensor:
    """int64 [n]: the tensor that owns each of the n entries."""
    positions = torch.arange(n, device=entries.offsets.device)
    return torch.searchsorted(entries.offsets[1:], positions, right=True)


def sort_keys(entries: Entries, n: int) -> Tensor:
    """int64 [n]: one number per entry that orders by (tensor, flat index)."""
    return (owners(entries, n) << 32) | entries.indices[:n].to(torch.int64)

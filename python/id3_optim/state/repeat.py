"""The strategy "repeat": an active set that is replaced, and the memory of every entry that was in it."""

from __future__ import annotations

import torch
from torch import Tensor

from id3_kernels import Entries

from .shard import Shard


class EverActive:
    """The entries of one shard that were ever active, and the values that they had before (originals)."""

    def __init__(self, shard: Shard):
        self.entries = Entries.empty(0, shard.device)
        self.originals: Tensor | None = None
        if shard.layout.originals:
            self.originals = torch.empty(0, dtype=shard.dtype, device=shard.device)

    def cover(self, n_tensors: int) -> None:
        """Covers n_tensors tensors; those that are new have no entry yet."""
        offsets, indices = self.entries
        missing = n_tensors + 1 - offsets.numel()
        self.entries = Entries(torch.cat([offsets, offsets[-1:].expand(missing)]), indices)

    def remember(self, kernels, new: Entries, values: Tensor) -> None:
        """Adds `new`, with the values that they have now; an entry that is known keeps its first value."""
        offsets, indices, held_at, new_at = kernels.union(*self.entries, *new)
        self.entries = Entries(offsets, indices).trimmed()
        if self.originals is not None:
            originals = values.new_empty(self.entries.indices.numel())
            originals[new_at] = values
            originals[held_at] = self.originals
            self.originals = originals


def replace(shard: Shard, ever: EverActive, new: Entries) -> None:
    """Makes `new` the active set. An entry that stays keeps its state, one that leaves loses it."""
    new = new.trimmed()
    held = Entries(shard.offsets[0], shard.arrays["indices"]).trimmed()
    _, held_at, new_at = shard.kernels.union(*held, *new)[1:]
    n_old, n_new = shard.n_active, new.indices.numel()
    values = shard.kernels.gather(shard.params, *new)
    ever.remember(shard.kernels, new, values)
    stayed = torch.zeros(n_old + n_new, dtype=torch.bool, device=shard.device)
    stayed[held_at] = True
    first = {"master": values.to(torch.float32), "indices": new.indices}
    arrays = {}
    for name, array in shard.arrays.items():
        carried = array.new_zeros(n_old + n_new)
        carried[held_at] = array[:n_old]
        row = carried[new_at]
        arrays[name] = array.new_empty(max(array.numel(), n_new))
        arrays[name][:n_new] = torch.where(stayed[new_at], row, first[name]) if name in first else row
    shard.hold(new.offsets.clone(), n_new, arrays)

"""Takes the entries that have moved least out of the active set, and gives them their first values back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from id3_kernels import Entries
from id3_kernels.entries import owners

from ..method import Prune
from ..state.active_set import ActiveSet
from ..state.layout import moved
from ..state.shard import Shard
from .gradients import Whole


def prune(active: ActiveSet, rule: Prune, grads: Sequence[Whole]) -> int:
    """Applies `Prune` once; returns how many entries have left: none of a tensor without a gradient in grads.

    Mutates the parameters at these entries and the active set, which is settled; this cannot be undone.
    Synchronises with a GPU.
    """
    home = active.shards[0].device
    shards = zip(active.shards, grads, strict=True)
    per_shard = [_distances(shard, rule.every, own.present()) for shard, own in shards]
    distance = torch.cat([moved(d, home) for d in per_shard])
    first = distance.argsort(stable=True)[: int(rule.share * active.n_active)]
    leaves = torch.zeros_like(distance, dtype=torch.bool)
    leaves[first] = distance[first] < torch.inf
    parts = leaves.split([d.numel() for d in per_shard])
    for shard, own in zip(active.shards, parts, strict=True):
        _put_back(shard, moved(own, shard.device))
    return int(leaves.sum())


def _distances(shard: Shard, at_least: int, present: list[bool]) -> Tensor:
    """float64 [n]: |θ − θ₀| of each active entry, in order; infinite before `at_least` updates, and in
    tensors that are not present."""
    shard.settle()
    n = shard.n_active
    weight, original = shard.weights()[0][:n].double(), shard.arrays["originals"][:n].double()
    owner = owners(Entries(shard.offsets[0], shard.arrays["indices"][:n]), n)
    stays = (shard.arrays["age"][:n] < at_least) | ~shard.mask(present)[owner]
    return (weight - original).abs_().masked_fill_(stays, torch.inf)


def _put_back(shard: Shard, leaves: Tensor) -> None:
    """Ends the activity of the entries of a settled shard that `leaves` marks, bool [n_active]."""
    held = Entries(shard.offsets[0], shard.arrays["indices"][: leaves.numel()])
    owner = owners(held, leaves.numel())
    originals = shard.arrays["originals"][: leaves.numel()]
    gone = _offsets(shard, owner[leaves])
    shard.kernels.scatter_(shard.params, gone, held.indices[leaves], originals[leaves])
    torch.autograd.graph.increment_version(shard.owners)
    stays = ~leaves
    offsets = _offsets(shard, owner[stays])
    n = int(offsets[-1])
    for array in shard.arrays.values():
        array[:n] = array[: leaves.numel()][stays]
    shard.hold(offsets, n, {})


def _offsets(shard: Shard, owner: Tensor) -> Tensor:
    """int64 [M + 1] of entries in order, each of tensor owner[i]."""
    counts = owner.bincount(minlength=len(shard.params))
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

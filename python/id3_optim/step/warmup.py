"""The first updates of an entry: how many it has had, and a learning rate that rises over them."""

from __future__ import annotations

import torch
from torch import Tensor

from id3_kernels.entries import owners

from ..state.shard import Shard


class Warmup:
    """What the youngest entries of a shard are to make of a step that AdamW takes at the full learning rate.

    Of an entry's k-th update min(k, steps) / steps is taken. AdamW's step, with weight decay, is linear in
    the learning rate, so that this is a learning rate of the entry's own. The moments are the ordinary ones.
    The op that updates is the ordinary one too, of any backend.
    """

    def __init__(self, shard: Shard, counted: Tensor | None, steps: int):
        """Before the step. counted: which tensors it updates, bool [M] or [1]; None for all."""
        self._shard, self._before, self._young, self._share = shard, shard.weights(), [], []
        for age, updated in zip(shard.by_run("age"), _updated(shard, counted), strict=True):
            self._young.append(updated & (age + 1 < steps))
            updates = (age + 1).to(shard.arrays["exp_avg"].dtype)
            self._share.append(
                updates / updates.new_full((), steps)
            )  # a number's reciprocal rounds, on a GPU

    def take_back(self) -> None:
        """After the step: leaves the young entries their share of it. Mutates parameters and masters."""
        shard = self._shard
        masters = shard.by_run("master") if "master" in shard.arrays else None
        rows = zip(shard.runs(), self._before, self._young, self._share, strict=True)
        for i, (run, before, young, share) in enumerate(rows):
            stored = shard.kernels.gather(shard.params, *run)
            after = stored if masters is None else masters[i]
            weight = torch.where(young, before + share * (after - before), after)
            shard.kernels.scatter_(shard.params, *run, torch.where(young, weight.to(stored.dtype), stored))
            if masters is not None:
                masters[i].copy_(weight)


def count_ages(shard: Shard, counted: Tensor | None) -> None:
    """Counts a step for the entries that it has updated, where the op has not. counted: as for `Warmup`."""
    for age, updated in zip(shard.by_run("age"), _updated(shard, counted), strict=True):
        age += updated


def _updated(shard: Shard, counted: Tensor | None) -> list[Tensor]:
    """bool beside the indices of each run: which of its entries a step updates, no padding."""
    found = []
    for run in shard.runs():
        n = run.indices.numel()
        held = torch.arange(n, device=shard.device) < run.offsets[-1]
        if counted is not None:
            owner = owners(run, n).clamp_(max=len(shard.params) - 1)
            held &= counted.expand(len(shard.params))[owner]
        found.append(held)
    return found

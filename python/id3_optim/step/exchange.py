"""Data parallelism in one step: replicas search for entries together and average what the step uses alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..distributed.replicas import Replicas
from ..heuristics import D3, Heuristic
from ..param_groups import members
from ..pieces import INDEX_BITS
from ..state.active_set import ActiveSet
from ..state.progress import Wanted
from ..state.shard import Shard
from .candidates import Candidates
from .gradients import Kept
from .products import flat_blocks, search

Place = tuple[int, int]  # tensor j of shard i


class Exchange:
    """What the hooks and the step of one replica send to the other replicas, and what they have sent so far.

    The mean over replicas of a whole gradient exists nowhere: each replica gets a part of each block, and
    looks there for entries that may join. At active entries a replica adds up its own gradients, which are
    averaged once per step.
    """

    unseen = ("process_group", "the gradients of other replicas")  # by torch's GradScaler

    def __init__(self, replicas: Replicas):
        self.replicas = replicas
        self.synced = True  # False within `no_sync`
        self.clear()

    def clear(self) -> None:
        """Forgets a step."""
        self._last_synced = True

    @contextmanager
    def no_sync(self, select_from: str | None) -> Iterator[None]:
        """See `ID3AdamW.no_sync`."""
        if select_from == "max":
            raise ValueError("no_sync: does not apply to select_from='max': each micro-batch has its say")
        self.synced = False
        try:
            yield
        finally:
            self.synced = True

    def begin_pass(self) -> None:
        """To be called at the beginning of each backward pass with hooks."""
        self._last_synced = self.synced

    # --- entries that may join -----------------------------------------------------------------------

    def search_blocks(
        self,
        candidates: Candidates,
        active: ActiveSet,
        at: Place,
        heuristic: D3,
        blocks: Iterator[tuple[int, Tensor]],
        may_hold: bool,
    ) -> None:
        """Takes candidates from this replica's part of the mean of each block.

        blocks: (first flat index, [n] of this replica's gradient of tensor `at`), the same sizes on all.
        """
        shard, _ = self._check_at(candidates, active, at)
        param = shard.params[at[1]].detach().reshape(-1)
        for first, block in blocks:
            begin, mean = self.replicas.scattered(block)
            if mean.numel():
                search(candidates, active, at, heuristic, param, first + begin, mean, may_hold)
            del block  # the next block is made now: two would be alive

    def search_gradient(
        self,
        candidates: Candidates,
        active: ActiveSet,
        at: Place,
        gradient: Tensor,
        heuristic: Heuristic,
        may_hold: bool,
    ) -> None:
        """Likewise from a whole gradient. Where the heuristic scores whole tensors, one replica gets it."""
        if isinstance(heuristic, D3):
            blocks = flat_blocks(gradient)
            self.search_blocks(candidates, active, at, heuristic, blocks, may_hold)
            return
        _, position = self._check_at(candidates, active, at)
        mean = self.replicas.mean_on(position % self.replicas.size, gradient)
        if mean is not None:
            candidates.search(active, at, mean, heuristic, may_hold)

    def _check_at(self, candidates: Candidates, active: ActiveSet, at: Place) -> tuple[Shard, int]:
        """(shard, position) of tensor `at`, whose gradient all replicas have to be at."""
        shard, wanted = active.shards[at[0]], candidates.wanted
        position = shard.positions[at[1]]
        name, more = active.name(position), f"{wanted.capacity} new entries in step {wanted.step}"
        self.replicas.check_at(f"the gradient of {name} for {more}", shard.device)
        return shard, position

    # --- a step --------------------------------------------------------------------------------------

    def agree(
        self, groups: list[dict[str, Any]], active: ActiveSet, kept: list[Kept], wanted: Wanted | None
    ) -> None:
        """Where this replica alone had no gradient of a tensor since the last step, it has zeros afterwards.

        Mutates `kept`, and gradients that are None. Raises RuntimeError where replicas take other steps.
        """
        if wanted is not None and not self._last_synced:
            raise RuntimeError("no_sync: expected the last backward pass of a step outside, got one inside")
        shards, dense = active.shards, [member.param for member in members(groups, dense=True)]
        params = [*(p for shard in shards for p in shard.owners), *dense]
        flags = [p.grad is not None for p in params] + [flag for own in kept for flag in own.seen]
        home, selects = groups[0]["params"][0].device, wanted is not None
        self.replicas.check_at(f"step() with{'' if selects else 'out'} a selection", home)
        found = iter(self.replicas.any_of(flags, home))
        for p in params:
            if next(found) and p.grad is None:
                p.grad = torch.zeros_like(p)
        for shard, own in zip(shards, kept, strict=True):
            anywhere = [next(found) for _ in own.seen]
            if anywhere != own.seen:
                own.values(shard)
                own.seen = anywhere

    def finish(self, groups: list[dict[str, Any]], active: ActiveSet, candidates: Candidates) -> None:
        """Makes the gradients at active entries and those of dense groups the means over the replicas, and
        the candidates of all replicas those of each."""
        kept = [shard.arrays["gradient"][held] for shard in active.shards for held in shard.stretches()]
        dense = [member.param.grad for member in members(groups, dense=True)]
        self.replicas.average_(kept + [gradient for gradient in dense if gradient is not None])
        if candidates.wanted is not None:
            candidates.meet(self.replicas.ranks, INDEX_BITS + active.n_numbers.bit_length())

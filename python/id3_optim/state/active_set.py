"""The active set Λ: every active entry with its state, in one shard per device and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from id3_kernels import Entries

from ..distributed.many_ranks import ManyRanks
from ..distributed.part import part_of
from ..param_groups import Member, Piece, in_pieces
from ..pieces import index_bits, index_dtype
from ..ranks import OneProcess
from . import repeat
from .layout import Layout
from .repeat import EverActive
from .shard import Shard
from .whole import cut, over_ranks

Joined = list[tuple[Shard, Entries, int]]  # what a join has added to which run, and `leave` can take back


class Touched(NamedTuple):
    """Entries of one parameter that training may have changed: indices int32 [n], flat and ascending; int64
    for a parameter of 2^31 entries or more.

    From `changed_since`, indices is None for a parameter of a dense group: all of it may have changed. The
    tensors are the optimizer's own: clone what is to outlive the next step.
    """

    param: Tensor
    indices: Tensor | None
    originals: Tensor | None  # [n] of the parameter's dtype, the values before they joined


class ActiveSet:
    """The shards, and which parameter lies where in them.

    Parameters are known by their position among all parameters of the optimizer; `names` are those of
    named parameters, by position. `n_active` and `touched` synchronise with a GPU. Where ranks hold parts of
    the parameters, the shards hold this rank's entries, and `count` those of all ranks.
    """

    def __init__(self, layout: Layout, names: list[str] | None = None):
        self.layout, self.names = layout, names
        self.ranks: OneProcess | ManyRanks = OneProcess()
        self.count: Tensor | None = None  # int64 [1], the active entries of all ranks, where they are many
        self.shards: list[Shard] = []
        self.ever: list[EverActive] = []  # one per shard, for the strategy "repeat" alone
        self._at: dict[int, tuple[int, int]] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_at": None}  # a copy's parameters have other ids

    # --- parameters ----------------------------------------------------------------------------------

    def adopt(self, rows: Iterable[Member]) -> None:
        """Takes parameters in the order of their positions into the shards, and makes missing shards."""
        taken: dict[Shard, list[Piece]] = {}
        held = sum(len(shard.params) for shard in self.shards)
        for piece in in_pieces(rows, held - len(self._located())):
            taken.setdefault(self.shard_for(piece.member.position, piece.member.param), []).append(piece)
        for shard, added in taken.items():
            shard.extend(added)
        self._map()
        for shard, ever in zip(self.shards, self.ever, strict=self.layout.repeat):
            ever.cover(len(shard.params))
        self._at = None

    def split_over(self, ranks: OneProcess | ManyRanks) -> None:
        """Takes the ranks that hold the parts of the parameters, of those too that `adopt` is to take."""
        self.ranks = ranks
        self._map()

    def _map(self) -> None:
        if self.ranks.alone:
            return
        bits = index_bits(p.numel() for shard in self.shards for p in shard.owners)
        for shard in self.shards:
            parts = [part_of(p) for p in shard.owners]
            shard.blocks, shard.index_bits = self.ranks.blocks(parts, shard.device), bits
        if self.count is None and self.shards:
            held = sum(shard.n_active for shard in self.shards)  # by whole parameters, which came before
            self.count = torch.tensor([held], device=self.shards[0].device)

    def shard_for(self, position: int, p: Tensor) -> Shard:
        """The shard that takes a parameter: one for each device and dtype."""
        shard = next((s for s in self.shards if (s.device, s.dtype) == (p.device, p.dtype)), None)
        return shard or self.new_shard(p.device, p.dtype)

    def new_shard(self, device: torch.device, dtype: torch.dtype) -> Shard:
        """A shard without parameters, appended to `shards`."""
        self.shards.append(Shard(device, dtype, self.layout))
        if self.layout.repeat:
            self.ever.append(EverActive(self.shards[-1]))
        return self.shards[-1]

    def keep_gradients(self, replicas: bool = False) -> None:
        """Makes room for the gradients that hooks gather at the active entries. replicas: for those too that
        are averaged over replicas."""
        self.layout = replace(self.layout, release=True, replicas=replicas or self.layout.replicas)
        for shard in self.shards:
            shard.keep_gradients(self.layout)

    def reserve(self, budget: int) -> None:
        """Capacity for all that may ever be active, where growing would have to read the count from a GPU."""
        n_entries = sum(p.numel() for shard in self.shards for p in shard.owners)
        for shard in self.shards:
            shard.limit = min(budget, shard.numel)
            synchronises = shard.device.type != "cpu" or shard.layout.capturable
            if shard.blocks is not None:
                shard.reserve(min(shard.limit, math.ceil(budget * shard.numel / n_entries)))
            elif synchronises or len(self.shards) == 1:
                shard.reserve(shard.limit)

    def locate(self, p: Tensor) -> tuple[int, int] | None:
        """(i, j): the parameter is tensor j of shard i, or its first piece is. None before it was adopted."""
        return self._located().get(id(p))

    def _located(self) -> dict[int, tuple[int, int]]:
        if self._at is None:
            every = [(p, i, j) for i, s in enumerate(self.shards) for j, p in enumerate(s.owners)]
            self._at = {id(p): (i, j) for p, i, j in reversed(every)}
        return self._at

    def name(self, position: int) -> str:
        return self.names[position] if self.names else f"parameter {position}"

    # --- entries -------------------------------------------------------------------------------------

    @property
    def n_active(self) -> int:
        """|Λ|: how many entries are active, over all ranks."""
        return sum(shard.n_active for shard in self.shards) if self.count is None else int(self.count)

    def join(self, picked: list[Entries], gradients: Sequence[Tensor | None], at_most: int) -> Joined:
        """Makes the entries active, in all shards or, if that fails, in none.

        at_most: how many entries are active at most afterwards, as the host knows.
        """
        joined: Joined = []
        try:
            for shard, new, gradient in zip(self.shards, picked, gradients, strict=True):
                joined.append((shard, new, shard.join(new, gradient, at_most)))
        except BaseException:
            self.leave(joined)
            raise
        return joined

    @property
    def n_numbers(self) -> int:
        """More than the largest number of a tensor."""
        return 1 + max(number for shard in self.shards for number in shard.numbers)

    def count_up(self, number: Tensor) -> None:
        """Counts the entries that a step has chosen on many ranks, once the step is done."""
        self.count.copy_(number if self.layout.repeat else self.count + number)

    def leave(self, joined: Joined) -> None:
        """Undoes a join whose step has failed, so that the step can be tried again."""
        for shard, new, run in joined:
            shard.leave(new, run)

    def replace(self, picked: list[Entries]) -> Joined:
        """Makes the entries the active ones (strategy "repeat"). Nothing of this can be undone."""
        for shard, ever, new in zip(self.shards, self.ever, picked, strict=True):
            repeat.replace(shard, ever, new)
        return []

    def touched(self, params: Iterable[Tensor]) -> Iterator[Touched]:
        """For each parameter the entries that training may have changed, over all ranks. Settles the shards.

        Where ranks hold parts of the parameters, every rank has to go through all of these.
        """
        rows = [self._touched_rows(i) for i in range(len(self.shards))]
        for p in params:
            at = self.locate(p)
            if at is None:
                yield Touched(p, torch.empty(0, dtype=index_dtype(p), device=p.device), None)
            else:
                yield Touched(p, *self._of_parameter(*at, rows[at[0]]))

    def _of_parameter(self, i: int, j: int, rows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor | None]:
        """(indices, originals) of the parameter whose first tensor is j of shard i, from the shard's rows."""
        found = [rows[n] for n in self.shards[i].pieces(j)] if self.ranks.alone else [rows[j]]
        indices, originals = ([row.get(name) for row in found] for name in ("indices", "originals"))
        if len(found) == 1:
            return indices[0], originals[0]
        return self.shards[i].joined(j, indices), None if originals[0] is None else torch.cat(originals)

    def _touched_rows(self, i: int) -> list[dict[str, Tensor]]:
        if self.layout.repeat:
            return self.ever_columns(i)
        return self.columns(i, ["originals"] if self.layout.originals else [])

    def columns(self, i: int, names: Iterable[str]) -> list[dict[str, Tensor]]:
        """For each tensor of shard i `indices` and the named arrays beside them, over all ranks. Settles."""
        shard = self.shards[i]
        shard.settle()
        return self._of_all(shard, shard.runs()[0], {name: shard.arrays[name] for name in names})

    def held(self) -> list[Tensor]:
        """All that is kept of this rank's active entries, without padding. Settles."""
        found = []
        for shard in self.shards:
            shard.settle()
            n, names = shard.n_active, shard.layout.columns(shard.dtype)
            found += [shard.offsets, shard.steps, *(shard.arrays[name][:n] for name in names)]
        return found

    def ever_columns(self, i: int) -> list[dict[str, Tensor]]:
        """Likewise of the entries that were ever active: `indices`, and `originals` where they are kept."""
        ever = self.ever[i]
        columns = {} if ever.originals is None else {"originals": ever.originals}
        return self._of_all(self.shards[i], ever.entries, columns)

    def _of_all(self, shard: Shard, entries: Entries, columns: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return cut(entries, columns) if self.ranks.alone else over_ranks(self.ranks, shard, entries, columns)

    def changed_since(self, params: Iterable[Tensor], step: int) -> Iterator[Touched]:
        """`touched` of those parameters that were updated after the first `step` steps and have entries."""
        updated_at = [shard.updated_at.tolist() for shard in self.shards]
        at = ((p, self.locate(p)) for p in params)
        changed = [p for p, at in at if at is not None and updated_at[at[0]][at[1]] > step]
        return (entry for entry in self.touched(changed) if entry.indices.numel())

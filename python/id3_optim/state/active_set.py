"""The active set Λ: every active entry with its state, in one shard per device and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from id3_kernels import Entries

from ..param_groups import Member
from ..ranks import OneProcess
from . import repeat
from .layout import Layout
from .repeat import EverActive
from .shard import Shard

Joined = list[tuple[Shard, Entries, int]]  # what a join has added to which run, and `leave` can take back


class Touched(NamedTuple):
    """Entries of one parameter that training may have changed: indices int32 [n], flat and ascending.

    From `changed_since`, indices is None for a parameter of a dense group: all of it may have changed. The
    tensors are the optimizer's own: clone what is to outlive the next step.
    """

    param: Tensor
    indices: Tensor | None
    originals: Tensor | None  # [n] of the parameter's dtype, the values before they joined


class ActiveSet:
    """The shards, and which parameter lies where in them.

    Parameters are known by their position among all parameters of the optimizer; `names` are those of
    named parameters, by position. `n_active` and `touched` synchronise with a GPU.
    """

    def __init__(self, layout: Layout, names: list[str] | None = None):
        self.layout, self.names, self.ranks = layout, names, OneProcess()
        self.shards: list[Shard] = []
        self.ever: list[EverActive] = []  # one per shard, for the strategy "repeat" alone
        self._at: dict[int, tuple[int, int]] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_at": None}  # a copy's parameters have other ids

    # --- parameters ----------------------------------------------------------------------------------

    def adopt(self, rows: Iterable[Member]) -> None:
        """Takes parameters in the order of their positions into the shards, and makes missing shards."""
        taken: dict[Shard, list[Member]] = {}
        for row in rows:
            taken.setdefault(self.shard_for(row.position, row.param), []).append(row)
        for shard, added in taken.items():
            shard.extend(added)
        for shard, ever in zip(self.shards, self.ever, strict=self.layout.repeat):
            ever.cover(len(shard.params))
        self._at = None

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

    def keep_gradients(self) -> None:
        """Makes room for the gradients that hooks gather at the active entries."""
        self.layout = replace(self.layout, release=True)
        for shard in self.shards:
            shard.keep_gradients(self.layout)

    def reserve(self, budget: int) -> None:
        """Capacity for all that may ever be active, where growing would have to read the count from a GPU."""
        for shard in self.shards:
            shard.limit = min(budget, shard.numel)
            synchronises = shard.device.type != "cpu" or shard.layout.capturable
            if synchronises or len(self.shards) == 1:
                shard.reserve(shard.limit)

    def locate(self, p: Tensor) -> tuple[int, int] | None:
        """(i, j): the parameter is tensor j of shard i. None before it was adopted."""
        if self._at is None:
            self._at = {id(p): (i, j) for i, s in enumerate(self.shards) for j, p in enumerate(s.params)}
        return self._at.get(id(p))

    def name(self, position: int) -> str:
        return self.names[position] if self.names else f"parameter {position}"

    # --- entries -------------------------------------------------------------------------------------

    @property
    def n_active(self) -> int:
        """|Λ|: how many entries are active."""
        return sum(shard.n_active for shard in self.shards)

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

    def leave(self, joined: Joined) -> None:
        """Undoes a join whose step has failed, so that the step can be tried again."""
        for shard, new, run in joined:
            shard.leave(new, run)

    def replace(self, picked: list[Entries]) -> Joined:
        """Makes the entries the active ones (strategy "repeat"). Nothing of this can be undone."""
        for shard, ever, new in zip(self.shards, self.ever, picked, strict=True):
            repeat.replace(shard, ever, new)
        return []

    def touched(self, p: Tensor) -> Touched:
        """The entries of a parameter that training may have changed, over all ranks. Settles its shard."""
        at = self.locate(p)
        if at is None:
            return Touched(p, torch.empty(0, dtype=torch.int32, device=p.device), None)
        i, j = at
        if self.layout.repeat:
            indices, originals = self.ever[i].of(j)
        else:
            indices, originals = (self.shards[i].column(name, j) for name in ("indices", "originals"))
        entries = {"indices": indices} | ({} if originals is None else {"originals": originals})
        whole = self.ranks.whole(entries)
        return Touched(p, whole["indices"], whole.get("originals"))

    def changed_since(self, params: Iterable[Tensor], step: int) -> Iterable[Touched]:
        """`touched` of those parameters that were updated after the first `step` steps and have entries."""
        updated_at = [shard.updated_at.tolist() for shard in self.shards]
        for p in params:
            at = self.locate(p)
            if at is not None and updated_at[at[0]][at[1]] > step:
                entry = self.touched(p)
                if entry.indices.numel():
                    yield entry

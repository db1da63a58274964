"""How far a run is: the steps done, the targets of its schedule, and how many entries it wants next."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import schedules
from .schedules import Schedule
from .state import Shard


class Wanted(NamedTuple):
    """How many entries should join: k int64 [1] on the first shard's device, at most `capacity`."""

    k: Tensor
    capacity: int


class Progress:
    """Counts the steps. Capturable: on the device, since a graph that is replayed runs no Python.

    `targets` is c(t) for every step, tabulated once the budget and the number of steps are known.
    """

    def __init__(self, capturable: bool):
        self.capturable = capturable
        self.done: int | Tensor = 0  # capturable: int64 [1] from the first step on
        self.targets: list[int] = []
        self._table: Tensor | None = None
        self._most_at_once = 0

    @property
    def steps_done(self) -> int:
        """Waits for the GPU where the optimizer is capturable."""
        return int(self.done)

    def forget_targets(self) -> None:
        self.targets, self._table = [], None

    def tabulate(self, schedule: Schedule, total_steps: int, budget: int, device: torch.device) -> None:
        self.targets = schedules.tabulate(schedule, total_steps, budget)
        increments = [b - a for a, b in pairwise([0, *self.targets])]
        self._most_at_once = min(4 * max(increments), budget)
        if self.capturable:
            self._table = torch.tensor(self.targets, device=device)
            self.done = torch.full((1,), self.steps_done, device=device)

    def now(self) -> int | Tensor:
        """The number of this step, the first being 0, as it stays when the run goes on."""
        return self.done.clone() if isinstance(self.done, Tensor) else self.done

    def advance(self, fine: Tensor | None) -> None:
        """One step more. fine: bool [1], False where the step was stopped by an overflow."""
        self.done += 1 if fine is None else fine  # a tensor in place: a captured graph holds its address

    def wanted(self, shards: list[Shard]) -> Wanted | None:
        """The schedule's increment, and what earlier steps could not give; None where that is known to be 0.

        Where all tensors are on the CPU, the number is at hand and the capacity exact; a GPU is not asked.
        """
        home, last = shards[0].device, len(self.targets) - 1
        n_active = sum(shard.offsets[-1:].to(home, non_blocking=True) for shard in shards)
        if self._table is None:
            target = self.targets[min(self.done, last)]
        else:
            target = self._table.index_select(0, self.done.clamp(max=last))
        k = (target - n_active).clamp_(0, self._most_at_once)
        if self.capturable or any(shard.device.type != "cpu" for shard in shards):
            return Wanted(k, self._most_at_once)
        return Wanted(k, int(k)) if k else None

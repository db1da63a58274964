"""How far a run is: the steps done, the targets of its schedule, and how many entries should join next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .. import schedules
from ..schedules import Schedule
from .active_set import ActiveSet
from .layout import moved


class Wanted(NamedTuple):
    """How many entries should join: k int64 [1] on the first shard's device, at most `capacity`.

    step: the number of the step that they join in, the first being 0; later steps leave it unchanged.
    target: how many entries are active at most afterwards.
    """

    k: Tensor
    capacity: int
    step: int | Tensor
    target: int


class Report:
    """A number that a GPU sends to the host from time to time, without any synchronisation."""

    def __init__(self) -> None:
        self._sent: Tensor | None = None  # int64 [1] in pinned memory
        self._event: torch.Event | None = None

    def send(self, number: Tensor) -> None:
        """Sends an int64 [1], unless one is on its way."""
        if self._event is None:
            if self._sent is None:
                self._sent = torch.empty(1, dtype=torch.int64, device="cpu", pin_memory=True)
            self._sent.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(number.device))

    def newest(self, before: int, wait: bool) -> int:
        """The number that has arrived since the last call, or `before`. wait: until what was sent arrives."""
        if self._event is not None and wait:
            self._event.synchronize()
        if self._event is None or not self._event.query():
            return before
        self._event = None
        return int(self._sent)


class Progress:
    """The count of steps, on the device where it is capturable: a graph that is replayed runs no Python.

    `targets` is c(t) for every step, tabulated once the budget and the number of steps are known.
    select_every: K; entries join in every K-th step alone.
    """

    def __init__(self, capturable: bool, steps_done: int = 0, select_every: int = 1):
        self.capturable, self.select_every = capturable, select_every
        self.done: int | Tensor = steps_done  # capturable: int64 [1] from the first step on
        self.targets: list[int] = []
        self._table: Tensor | None = None
        self._most_at_once = 0
        self._n_known, self._report = 0, Report()  # a GPU holds at least so many active entries

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_report": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _report=Report())

    @property
    def spent(self) -> bool:
        """Whether the steps done were to spend the whole budget. Synchronises as `steps_done` does."""
        done = min(self.steps_done, len(self.targets))
        return done > 0 and self.targets[done - 1] == self.targets[-1]

    @property
    def steps_done(self) -> int:
        """Synchronises with the GPU where the optimizer is capturable."""
        return int(self.done)

    def forget_targets(self) -> None:
        self.targets, self._table = [], None

    def tabulate(
        self,
        schedule: Schedule,
        total_steps: int,
        budget: int,
        device: torch.device,
        growth: Sequence[tuple[int, int]] = (),
    ) -> None:
        """growth: (step, entries) of what was added later to the budget, which counts it."""
        first = budget - sum(entries for _, entries in growth)
        targets = schedules.grown(schedules.tabulate(schedule, total_steps, first), schedule, growth)
        self.targets = schedules.in_windows(targets, schedule, self.select_every)
        increments = [b - a for a, b in pairwise([0, *self.targets])]
        self._most_at_once = min(4 * max(increments), budget)
        if self.capturable:
            self._table = torch.tensor(self.targets, device=device)
            self.done = torch.full((1,), self.steps_done, device=device)

    def advance(self, not_overflowed: Tensor | None) -> None:
        """One step more. not_overflowed: bool [1], False where an overflow has stopped the step."""
        # A tensor is changed in place: a captured graph holds its address.
        self.done += 1 if not_overflowed is None else not_overflowed

    def wanted(self, active: ActiveSet, freed: int = 0) -> Wanted | None:
        """The schedule's increment, and what earlier steps could not give; None where that is known to be 0,
        and between two selections. With the strategy "repeat" the whole budget, at every step.

        freed: how many entries this step has taken out of the active set.
        On the CPU the number is at hand and the capacity exact. The number of active entries is not read from
        a GPU: what it reported of earlier steps is a lower bound, since the active set only grows.
        """
        if not active.shards or (not self.capturable and self.done % self.select_every):
            return None
        home, last = active.shards[0].device, len(self.targets) - 1
        if active.layout.repeat:
            budget = self.targets[-1]
            return Wanted(torch.full((1,), budget, device=home), budget, self.done, budget)
        counts = (
            (shard.offsets[:, -1] - shard.offsets[:, 0]).sum(0, keepdim=True) for shard in active.shards
        )
        n_active = active.count
        if n_active is None:
            n_active = sum(count if count.device == home else moved(count, home) for count in counts)
        if self.capturable:
            target = self._table.index_select(0, self.done.clamp(max=last))
            k = (target - n_active).clamp_(0, self._most_at_once)
            k *= self.done % self.select_every == 0
            return Wanted(k, self._most_at_once, self.done.clone(), self.targets[-1])
        target = self.targets[min(self.done, last)]
        if freed:  # reports of earlier steps are no bound any more
            self._n_known, self._report = 0, Report()
        if home.type == "cuda":
            alike = active.layout.replicas or not active.ranks.alone  # what arrives in time differs by rank
            self._n_known = self._report.newest(self._n_known, wait=alike)
            self._report.send(n_active)
        elif home.type == "cpu":
            self._n_known = int(n_active)
        capacity = min(target - self._n_known, self._most_at_once + freed)
        if capacity <= 0:
            return None
        return Wanted((target - n_active).clamp_(0, capacity), capacity, self.done, target)

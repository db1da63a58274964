"""How far a run is: the steps done, the targets of its schedule, and how many entries it wants next."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import schedules
from .schedules import Schedule
from .state import Shard, moved


class Wanted(NamedTuple):
    """How many entries should join: k int64 [1] on the first shard's device, at most `capacity`."""

    k: Tensor
    capacity: int


class Report:
    """A number that a GPU sends to the host now and then, for which nobody waits."""

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

    def newest(self, before: int) -> int:
        """The number that has arrived since the last call, or `before`."""
        if self._event is None or not self._event.query():
            return before
        self._event = None
        return int(self._sent)


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
        self._n_known, self._report = 0, Report()  # a GPU holds at least so many active entries

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_report": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _report=Report())

    @property
    def steps_done(self) -> int:
        """Waits for the GPU where the optimizer is capturable."""
        return int(self.done)

    def begin_at(self, steps_done: int) -> None:
        """Forgets all but the number of steps."""
        self.__init__(self.capturable)
        self.done = steps_done

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

        On the CPU the number is at hand and the capacity exact. A GPU is not asked, but what it reported of
        earlier steps bounds the number: the active set only grows.
        """
        home, last = shards[0].device, len(self.targets) - 1
        n_active = sum(moved(shard.offsets[-1:], home) for shard in shards)
        if self.capturable:
            target = self._table.index_select(0, self.done.clamp(max=last))
            return Wanted((target - n_active).clamp_(0, self._most_at_once), self._most_at_once)
        target = self.targets[min(self.done, last)]
        if home.type == "cuda":
            self._n_known = self._report.newest(self._n_known)
            self._report.send(n_active)
        elif home.type == "cpu":
            self._n_known = int(n_active)
        capacity = min(target - self._n_known, self._most_at_once)
        return Wanted((target - n_active).clamp_(0, capacity), capacity) if capacity > 0 else None

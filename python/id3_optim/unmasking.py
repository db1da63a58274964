"""A run of step-by-step unmasking: `step` is the paper's algorithm 1: target, select, join, update."""

from __future__ import annotations

import numbers
import time
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import compatibility, schedules, validation
from .distributed.agreement import check_agreement, check_replicable, check_replicas
from .distributed.many_ranks import holders_of, ranks_of
from .distributed.replicas import Replicas
from .method import Method
from .param_groups import members, named_parameters, parameter_names, selectable, trainable_entries
from .running import Running
from .state.active_set import ActiveSet, Touched
from .state.checkpoint import Restored
from .state.layout import Layout
from .state.parameter_state import fill
from .state.progress import Progress, Wanted
from .step import gradients
from .step.pruning import prune
from .step.release import Begin, Release
from .step.scaling import Scaling
from .step.selection import Selection, select
from .step.update import update

Groups = list[dict[str, Any]]  # an optimizer's param groups


class Unmasking:
    """The active set of a run and how far the run is, apart from torch's Optimizer and its param groups.

    `budget` is as it was given until the first step, which makes a share of N a number of entries.
    """

    def __init__(self, method: Method, layout: Layout):
        self.method = method
        self.budget = method.budget_given
        self.total_steps: int | None = None
        self.n_entries: int | None = None
        self.growth: list[tuple[int, int]] = []  # (step, entries) of every growth of the budget
        self.last_selection: Selection | None = None
        self.phase_seconds = {"select": 0.0, "update": 0.0}
        self.active = ActiveSet(layout)
        self.progress = Progress(layout.capturable, select_every=method.select_every)
        self.release: Release | None = None
        self.replicas: Replicas | None = None
        self.agreed = False  # whether the ranks were found to have the same settings since the last load

    # --- before the first step -------------------------------------------------------------------------

    def take_gradients(
        self, begin: Begin, group: torch.distributed.ProcessGroup | None, select_from: str, groups: Groups
    ) -> None:
        """Averages gradients over a group's processes; hooks the parameters where gradients are released."""
        released = self.active.layout.release
        if group is not None:
            check_replicable(group, self.method, self.active.layout.capturable)
            self.replicas = Replicas(group)
            self.active.keep_gradients(replicas=True)
            self.release = Release(begin, self.method.heuristic, None, self.replicas)
        if released:
            self.release_gradients(begin, select_from, groups)

    select_from = property(lambda self: None if self.release is None else self.release.select_from)
    releases = property(lambda self: self.select_from is not None)

    def no_sync(self) -> AbstractContextManager[None]:
        """See `ID3AdamW.no_sync`."""
        exchange = None if self.release is None else self.release.exchange
        return nullcontext() if exchange is None else exchange.no_sync(self.select_from)

    def share_overflow(self, flags: list[Tensor]) -> None:
        """Makes an overflow on one rank known to all, where each has gradients of its own."""
        if self.replicas is not None:
            self.replicas.share(flags)
        elif self.release is not None:
            self.active.ranks.share(flags)

    def release_gradients(self, begin: Begin, select_from: str | None, groups: Groups) -> Release:
        """Hooks the parameters, so that their gradients are taken as soon as backward has made them; again
        where the hooks were removed. select_from: None for "last", or what it is already."""
        if self.releases:
            if select_from not in (None, self.release.select_from):
                own = self.release.select_from
                raise ValueError(
                    f"select_from: expected {own!r} as the optimizer has it, got {select_from!r}"
                )
            self.release.hooked = True
            self.release.attach(selectable(groups))
            return self.release
        select_from = select_from or "last"
        capturable = self.active.layout.capturable
        compatibility.check_options(self.method, True, select_from, capturable)
        if self.replicas is None:
            compatibility.check_reduced(selectable(groups))
        self.active.keep_gradients()
        self.release = Release(begin, self.method.heuristic, select_from, self.replicas)
        self.release.attach(selectable(groups))
        return self.release

    def add_group(self, groups: Groups) -> None:
        """Checks the last param group and takes its parameters. Raises before anything changes."""
        i, active = len(groups) - 1, self.active
        group = groups[i]
        validation.check_group(group, i)
        validation.check_names(self.method.heuristic, groups[0])
        compatibility.check_large(self.method, groups)
        held = (p for shard in active.shards for p in shard.owners)
        compatibility.check_devices(active.layout, chain(held, group["params"]), group["dense"])
        names = parameter_names(groups)
        if self.n_entries is not None and not group["dense"]:
            validation.check_countable(groups, names)
            if self.progress.spent and not active.layout.repeat:
                validation.warn_spent(self.budget, self.method, group)
            self.n_entries += trainable_entries([group])
            active.split_over(ranks_of(named_parameters(groups)))
            active.adopt(members(groups, dense=False, since=i))
            active.reserve(self.budget)
        active.names, self.agreed = names, False
        if self.release is not None:
            self.release.attach(selectable(groups))

    def grow_budget(self, groups: Groups) -> None:
        """See `ID3AdamW.grow_budget`."""
        share = self.method.budget_given
        if not isinstance(share, float):
            raise ValueError(f"budget: expected a share, which grows with N, got {share} entries")
        if self.n_entries is None:
            return
        validation.check_countable(groups, self.active.names)
        n_entries = max(self.n_entries, trainable_entries(groups))
        added = schedules.resolve_budget(share, n_entries) - self.budget
        self.n_entries = n_entries
        if added > 0:
            self.budget += added
            self.growth.append((self.progress.steps_done, added))
            self.active.reserve(self.budget)
            self._forget_targets()

    def set_total_steps(self, total_steps: int) -> None:
        """See `ID3AdamW.set_total_steps`."""
        schedules.check_total_steps(total_steps)
        if total_steps == self.total_steps:
            return  # what a captured graph reads stays in its place
        if self.progress.steps_done > 0:
            expected = f"{self.total_steps} as at the first step"
            raise ValueError(f"total_steps: expected {expected} (it cannot change), got {total_steps}")
        validation.warn_one_selection(self.method, total_steps)
        self.total_steps = int(total_steps)
        self._forget_targets()

    def _forget_targets(self) -> None:
        self.progress.forget_targets()
        if self.release is not None:
            self.release.replan()

    def begin(self, groups: Groups) -> None:
        """Fixes N, the budget and the shards, at the first gradient or step or when a state is loaded.

        As long as nothing requires a gradient but dense groups, there is nothing to fix.
        """
        n_entries = self.n_entries
        if n_entries is None:
            validation.check_countable(groups, self.active.names)
            n_entries = trainable_entries(groups)
        if not self.active.shards and (n_entries or self.progress.steps_done == 0):
            for i, group in enumerate(groups):
                validation.check_params(group, i)
            compatibility.check_large(self.method, groups)
        if n_entries == 0:
            validation.check_nothing_to_train(groups, self.active.names)
            return
        if self.n_entries is None:
            self.budget = schedules.resolve_budget(self.method.budget_given, n_entries)
            self.n_entries = n_entries
        if not self.active.shards:
            active = ActiveSet(self.active.layout, self.active.names)
            active.split_over(ranks_of(named_parameters(groups)))
            active.adopt(members(groups, dense=False))
            compatibility.check_devices(active.layout, selectable(groups))
            active.reserve(self.budget)
            self.active = active
        if not self.progress.targets and self.total_steps is not None and self.active.shards:
            schedule, device = self.method.effective_schedule(), self.active.shards[0].device
            self.progress.tabulate(schedule, self.total_steps, self.budget, device, self.growth)

    def begin_pass(self, groups: Groups) -> tuple[ActiveSet, Wanted | None]:
        """What a step or a backward pass with hooks needs before its start: `begin`, the next increment."""
        if not self.agreed:
            self._agree(groups)
        if self.total_steps is None:
            raise ValueError(
                "total_steps: expected the number of steps of the run (set_total_steps), got None"
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            compatibility.check_capture(self.active.layout.capturable, bool(self.active.shards))
        self.begin(groups)
        return self.active, self.progress.wanted(self.active)

    def _agree(self, groups: Groups) -> None:
        """Before all else, since a rank that fails alone leaves the other ranks waiting."""
        ranks = ranks_of(named_parameters(groups))
        compatibility.check_ranks(self.method, ranks.alone)
        if not self.active.shards:  # dense groups alone: their norm is over all ranks, too
            self.active.split_over(ranks)
        if self.replicas is not None:
            taken = self.select_from or "by the step"
            check_replicas(self.replicas, self.settings(), groups, self.active.held(), taken)
        elif not (holders := holders_of(named_parameters(groups))).alone:
            check_agreement(holders, self.settings(), groups)
        self.agreed = True

    # --- algorithm 1 -----------------------------------------------------------------------------------

    def step(self, groups: Groups, dense_state: MutableMapping[Tensor, dict], scaling: Scaling) -> None:
        """One step. Mutates active entries of the parameters, dense groups, all state, and the active set."""
        active, wanted = self.begin_pass(groups)
        if isinstance(self.method.heuristic, Running):
            self.method.heuristic.read(groups)
        if self.release is None:
            grads = gradients.of_step(active, groups)
        else:
            grads = self.release.gradients(groups, active, wanted)
        started, joined = time.perf_counter(), []
        rule = self.method.prune
        if rule is not None and active.shards and rule.due(self.progress.done, self.total_steps):
            wanted = self.progress.wanted(active, freed=prune(active, rule, grads))
        if wanted is not None:
            if scaling.not_overflowed is not None:
                wanted = wanted._replace(k=wanted.k * scaling.not_overflowed)
            if self.release is None:
                cap = self.method.tensor_cap and max(1, int(self.method.tensor_cap * self.budget + 1e-6))
                picked, values, score, number = select(active, grads, self.method.heuristic, wanted, cap)
            else:
                picked, values, score, number = self.release.candidates.chosen(active, wanted)
            if active.layout.repeat:
                joined = active.replace(picked)
            else:
                joined = active.join(picked, values, wanted.target)
            self.last_selection = Selection(wanted.step, score, number)
        selected = time.perf_counter()
        nth, entry_warmup = self.progress.done + 1, self.method.entry_warmup
        update(active, grads, groups, dense_state, scaling, nth, joined, entry_warmup)
        if wanted is not None and active.count is not None:
            active.count_up(number)
        self.phase_seconds["select"] += selected - started
        self.phase_seconds["update"] += time.perf_counter() - selected
        self.progress.advance(scaling.not_overflowed)

    # --- what has changed, and what is saved -------------------------------------------------------------

    def touched(self, groups: Groups) -> Iterator[Touched]:
        """See `ID3AdamW.touched`."""
        return self.active.touched(selectable(groups))

    def changed_since(
        self, step: int, groups: Groups, dense_state: MutableMapping[Tensor, dict]
    ) -> Iterator[Touched]:
        """See `ID3AdamW.changed_since`."""
        if self.method.prune is not None:
            raise ValueError("changed_since: does not apply to prune: entries that left are not remembered")
        done = self.progress.steps_done
        if not isinstance(step, numbers.Integral) or not 0 <= step <= done:
            raise ValueError(f"step: expected 0 to {done} (steps_done), got {step}")
        dense = (row.param for row in members(groups, dense=True) if done > step)
        whole = (Touched(p, None, None) for p in dense if p in dense_state)  # those that have had a gradient
        return chain(self.active.changed_since(selectable(groups), step), whole)

    def settings(self) -> dict[str, Any]:
        """See `ID3AdamW.settings`."""
        return {
            "method": "id3",
            "step": self.progress.steps_done,
            "total_steps": self.total_steps,
            "budget": self.budget,
            "budget_given": self.method.budget_given,  # here, so that saved files keep their order and bytes
            "n_entries": self.n_entries,
            **({"budget_growth": [list(pair) for pair in self.growth]} if self.growth else {}),
            **self.method.describe(),
        }

    def restore(self, saved: Restored, groups: Groups) -> None:
        """Takes over a checked state; the param groups are those that torch has loaded."""
        self.progress = Progress(self.active.layout.capturable, saved.steps_done, self.method.select_every)
        self.total_steps = saved.total_steps if self.total_steps is None else self.total_steps
        self.active, self.agreed = ActiveSet(self.active.layout, parameter_names(groups)), False
        self.n_entries, self.budget, self.growth = saved.n_entries, saved.budget, list(saved.growth)
        if self.n_entries is not None:
            self.begin(groups)
            fill(self.active, saved.sparse, saved.steps_done)
        if self.release is not None:
            self.release.clear()

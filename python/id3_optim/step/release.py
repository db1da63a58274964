"""Released gradients: hooks keep what a step needs of each tensor's gradient, and let the gradient go.

A step needs the values at active entries and the few entries that may join. Both are taken the moment that
autograd has finished a tensor; what is kept adds up over micro-batches, and `step()` works on it alone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..compatibility import check_reduced
from ..distributed.part import local_gradient
from ..distributed.replicas import Replicas
from ..heuristics import Heuristic
from ..param_groups import selectable
from ..pieces import rows_of
from ..state.active_set import ActiveSet
from ..state.progress import Wanted
from . import gradients, hooks
from .candidates import Candidates
from .exchange import Exchange
from .grad_scaler import check_seen
from .gradients import Kept
from .needed import Needed, NeededFeatures
from .passes import Passes, in_two_parts
from .products import Parts, collect_blocks, every_block
from .streams import Streams

Begin = Callable[[], tuple[ActiveSet, Wanted | None]]


class Release:
    """The hooks of an optimizer, and what they have taken since its last step.

    begin: a bound method that gives the active set and how many entries are to join in the coming step. It is
    held weakly, and called where a backward pass begins. select_from: None where there are no hooks, so that
    gradients are taken by the step. replicas: the processes over which gradients are averaged.
    """

    def __init__(
        self, begin: Begin, heuristic: Heuristic, select_from: str | None, replicas: Replicas | None
    ):
        self.heuristic, self.select_from = heuristic, select_from
        self.exchange = None if replicas is None else Exchange(replicas)
        self.hooked = select_from is not None  # False too when `remove_hooks` was called
        self._make_own(begin)
        self.clear()

    def __getstate__(self) -> dict:
        own = ("_handles", "_lock", "_begin", "_active", "_passes", "_needed", "_undecided", "_streams")
        return {name: x for name, x in self.__dict__.items() if name not in own}

    def _make_own(self, begin: Begin) -> None:
        self._begin: weakref.WeakMethod[Begin] = weakref.WeakMethod(begin)
        self._active: ActiveSet | None = None
        self._passes, self._needed = Passes(), NeededFeatures()
        self._undecided = False  # a forward pass was answered before the run began
        self._handles: dict[int, torch.utils.hooks.RemovableHandle] = {}
        self._lock = threading.Lock()  # autograd has a thread for each device
        self._streams = Streams()
        weakref.finalize(self, hooks.remove, self._handles).atexit = False

    def rebind(self, begin: Begin, params: Iterable[Tensor]) -> None:
        """Makes a deep copy, or what was unpickled, another optimizer's own, with hooks on its parameters."""
        if not hasattr(self, "_handles"):  # a shallow copy shares everything
            self._make_own(begin)
        self.attach(params)

    def belongs_to(self, optimizer: Any) -> bool:
        """Whether it is this optimizer that takes the gradients."""
        return (begin := self._begin()) is not None and begin.__self__ is optimizer

    def clear(self) -> None:
        """Forgets everything since the last step."""
        self.candidates: Candidates | None = None
        self.kept: list[Kept] = []
        self.seen_by_scaler = False
        self._passes.end()
        if self.exchange is not None:
            self.exchange.clear()

    # --- hooks ---------------------------------------------------------------------------------------

    def attach(self, params: Iterable[Tensor]) -> None:
        """Hooks every parameter that requires a gradient and has no hook of this optimizer yet.

        Parameters of lazy modules take hooks once they have a shape.
        """
        if not self.hooked:
            return
        take = partial(hooks.take, weakref.ref(self))
        for p in params:
            if p.requires_grad and id(p) not in self._handles and not torch.nn.parameter.is_lazy(p):
                hooks.take_over(p)
                self._handles[id(p)] = p.register_post_accumulate_grad_hook(take)

    def detach(self, param: Tensor) -> None:
        """Takes the hook off one parameter."""
        if (handle := self._handles.pop(id(param), None)) is not None:
            handle.remove()

    def remove_hooks(self) -> None:
        self.hooked = False
        hooks.remove(self._handles)

    def alone_at(self, param: Tensor) -> bool:
        """Whether no hook of anything else waits for the parameter's gradient."""
        hooks, own = param._post_accumulate_grad_hooks or {}, self._handles.get(id(param))
        return not hooks or (own is not None and hooks.keys() == {own.id})

    def take(self, param: Tensor) -> None:
        """What a hook does. Does not synchronise with a GPU."""
        with self._lock:
            repeated = self._passes.enter(id(param), self._begin_pass)
        if repeated:
            raise in_two_parts(self.name(param))
        self._collect(param)

    def gradients(self, groups: list[dict[str, Any]], active: ActiveSet, wanted: Wanted | None) -> list[Kept]:
        """At a step: what was kept, with the gradients that no hook has taken (assigned by hand, unfrozen
        since)."""
        if self._passes.unfinished:
            raise RuntimeError(
                "release_gradients: expected a finished backward pass, got one that failed: call zero_grad()"
            )
        self._prepare(active, wanted)
        gradients.check_dense(self._active, groups)
        if self.exchange is not None:
            self.exchange.agree(groups, active, self.kept, self.candidates.wanted)
        for p in selectable(groups):
            if p.grad is not None:
                self._collect(p)
        self._undecided = False
        if self.exchange is not None:
            self.exchange.finish(groups, active, self.candidates)
        return self.kept

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The memory of the candidates, and that of the features that `needed` has found."""
        return [] if self.candidates is None else self.candidates.tensors(), self._needed.tensors()

    def replan(self) -> None:
        """The coming step may have another number of entries to choose, where no gradient is taken yet."""
        if not any(any(kept.seen) for kept in self.kept):
            self.candidates = None

    # --- weights whose gradient never exists whole (sparse_backward) -----------------------------------

    def selects(self, has_gradient: bool = False) -> bool:
        """Whether entries may join in the coming step, which then looks at every entry's gradient.

        A run is begun by its first gradient (has_gradient), not by a forward pass. Before that the answer is
        True, and stays so until the step, since a checkpoint computes a forward pass again.
        """
        if not has_gradient:
            self._undecided |= self._active is None
            if self._undecided:
                return True
        if self.candidates is None:
            self._prepare(*self._begun())
        return self.candidates.wanted is not None and (self.exchange is None or self.exchange.synced)

    def uses(self, param: Tensor) -> bool:
        """Whether the coming step looks at the gradient of a parameter: not where it has no active entry in a
        step that does not select. Does not synchronise: on a GPU always True."""
        if self.selects() or (at := self._active.locate(param)) is None:
            return True
        shard, j = self._active.shards[at[0]], at[1]
        return shard.device.type != "cpu" or any(run[j] < run[j + 1] for run in shard.bounds)

    def suffices(self, param: Tensor, parts: Parts) -> bool:
        """Whether `take_parts` can take them, of which the forward pass perhaps kept what it needs alone."""
        if self.selects(has_gradient=True):
            return parts.complete
        return parts.suffices(self._needed_now(param, parts), self.uses(param))

    def needed(self, param: Tensor, dim: int) -> Needed | None:
        """Which features of its layer's input a weight, whose dimension `dim` they are, needs in a step that
        does not select; None: all. Does not synchronise: on a GPU None."""
        at = self._active.locate(param)
        shard = self._active.shards[at[0]]
        return self._needed.of(shard, at, dim) if shard.device.type == "cpu" else None

    def _needed_now(self, param: Tensor, parts: Parts) -> Needed | None:
        """`needed`, where `parts` has what was needed in the forward pass: the state may be settled since."""
        return None if parts.needed is None else self.needed(param, parts.needed.dim)

    def take_parts(self, param: Tensor, parts: Parts) -> None:
        """What a layer's backward pass does in place of making the gradient of its weight."""
        with self._lock:
            repeated = self._passes.enter(id(param), self._begin_pass, within=1)
        selects = self.selects(has_gradient=True)
        if repeated and selects:
            raise in_two_parts(self.name(param))
        i, j = at = self._active.locate(param)
        shard, kept = self._active.shards[i], self.kept[i]
        self._follow(i)
        gradients.check(self._active, shard, j, param.grad)
        seen, place = kept.seen[j], (self.candidates, self._active, at, self.heuristic)
        may_hold = seen and self.select_from == "max"
        if selects and self.exchange is None:
            collect_blocks(*place, parts.blocks(param), seen, may_hold)
        else:
            parts.now(self._needed_now(param, parts)).gather(shard, j, seen)
            if selects:
                self.exchange.search_blocks(*place, every_block(param, parts.blocks(param)), may_hold)
        kept.seen[j] = True

    def name(self, param: Tensor) -> str:
        """The name of a parameter that was adopted."""
        i, j = self._active.locate(param)
        return self._active.name(self._active.shards[i].positions[j])

    check_scaler = check_seen

    def scaled_tensors(self, active: ActiveSet) -> list[Tensor]:
        """All that is proportional to the loss scale; the caller, a GradScaler, checks and unscales it."""
        self.seen_by_scaler = True
        if self.candidates is None:
            return []
        self._follow_all()
        # A shard that was added since the last pass has kept nothing yet.
        values = [kept.values(shard) for kept, shard in zip(self.kept, active.shards, strict=False)]
        return [t for t in self.candidates.scaled_tensors(self.heuristic) + values if t.numel()]

    def _begin_pass(self, unfinished: bool) -> None:
        if unfinished:
            self.clear()
        if self.candidates is None or self._active is None:
            self._prepare(*self._begun())
        else:  # another micro-batch of the same step
            self._prepare(self._active, self.candidates.wanted)
        if self.exchange is None:
            check_reduced(p for shard in self._active.shards for p in shard.owners)
        else:
            self.exchange.begin_pass()
        if self.select_from == "last":
            self.candidates.forget()

    def _begun(self) -> tuple[ActiveSet, Wanted | None]:
        self._follow_all()
        return self._begin()()

    def _follow(self, i: int) -> None:
        """Lets the current stream of shard i's device wait for what was done there before."""
        shard = self._active.shards[i]
        own = [] if self.candidates is None else self.candidates.memory(i)
        self._streams.follow(shard.device, [*shard.arrays.values(), *shard.tables(), *own])

    def _follow_all(self) -> None:
        for i in range(0 if self._active is None else len(self._active.shards)):
            self._follow(i)

    def _prepare(self, active: ActiveSet, wanted: Wanted | None) -> None:
        """Makes room for all shards; the first call after a step sets how many entries join in the next."""
        self._active = active
        shards = self._active.shards
        self.attach(p for shard in shards for p in shard.owners)
        if self.candidates is None:
            self.candidates = Candidates(wanted)
        self.candidates.cover(shards)
        for i, shard in enumerate(shards):
            if i == len(self.kept):
                self.kept.append(Kept())
            self.kept[i].cover(len(shard.params))
        self._follow_all()

    def _collect(self, param: Tensor) -> None:
        i, first = self._active.locate(param)
        shard = self._active.shards[i]
        self._follow(i)
        tensors = shard.pieces(first)
        if shard.split:
            shard.renew(tensors)
        gradient = local_gradient(param)
        for j in tensors:
            self._collect_tensor(i, j, rows_of(gradient, shard.ranges[j]))
        param.grad = None

    def _collect_tensor(self, i: int, j: int, gradient: Tensor) -> None:
        shard, kept = self._active.shards[i], self.kept[i]
        gradients.check(self._active, shard, j, gradient)
        seen = kept.seen[j]
        # Candidates of earlier passes are forgotten before each pass unless the best of all is chosen.
        repeated = seen and self.select_from == "max"
        place = self._active, (i, j), gradient, self.heuristic
        if self.exchange is None:
            self.candidates.collect(*place, seen, repeated)
        else:
            self.candidates.keep(*place, seen)
            if self.selects(has_gradient=True):
                self.exchange.search_gradient(self.candidates, *place, repeated)
        kept.seen[j] = True

"""Gradients never whole: hooks keep what a step needs of each tensor's gradient, and let the gradient go.

A step needs the values at active entries and the few entries that may join. Both are taken the moment that
autograd has finished a tensor; what is kept adds up over micro-batches, and `step()` works on it alone.
"""

from __future__ import annotations

import sys
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from id3_kernels import Entries
from id3_kernels.table import candidate_room

from .gradients import check_gradient, check_place
from .heuristics import D3, scores
from .progress import Wanted
from .selection import NOBODY, best_of, entries_at, gathered
from .state import Shard, moved
from .validation import check_one_process

if TYPE_CHECKING:
    from .optimizer import ID3AdamW


class Best(NamedTuple):
    """The candidates of a shard, on its device: the best k so far are among them. Nobody: 0, -1, 0."""

    score: Tensor  # [room]
    place: Tensor  # int64 [room]: tensor position << 32 | flat index
    grad: Tensor  # [room]
    state: Tensor  # int64, the backend's own

    @classmethod
    def nobody(cls, k: int, shard: Shard) -> Best:
        wide = shard.arrays["gradient"]
        room, length = candidate_room(shard.device, shard.layout.backend, k) if k else (0, 0)
        place = torch.full((room,), -1, dtype=torch.int64, device=shard.device)
        return cls(wide.new_zeros(room), place, wide.new_zeros(room), place.new_zeros(length))

    def forget(self) -> None:
        self.score.zero_()
        self.place.fill_(-1)
        self.grad.zero_()
        self.state.zero_()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self)


class Release:
    """What the hooks of an optimizer have taken since its last step: `best` per shard, the values in the
    shards' own `gradient` arrays, and which backward pass is running.

    A pass is known by autograd's graph task. Reentrant checkpoints run backward passes of their own inside
    it; these are told apart by what stands on the Python stack.
    """

    def __init__(self, select_from: str):
        self.select_from = select_from
        self.hooked = True  # False: `remove_hooks` was called
        self._handles: dict[int, torch.utils.hooks.RemovableHandle] = {}
        self._lock = threading.Lock()  # autograd has a thread for each device
        self.clear()

    def clear(self) -> None:
        """Forgets everything since the last step."""
        self.best: list[Best] = []
        self.seen_by_scaler = False
        self._begun = False
        self._end_pass()

    def _end_pass(self) -> None:
        self._root: int | None = None  # the graph task of a pass that runs, where a hook fired in it
        self._first: int | None = None
        self._in_pass: set[int] = set()

    def __getstate__(self) -> dict:
        return {name: x for name, x in self.__dict__.items() if name not in ("_handles", "_lock", "_at")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _handles={}, _lock=threading.Lock())
        self._end_pass()

    # --- hooks ---------------------------------------------------------------------------------------

    def attach(self, optimizer: ID3AdamW) -> None:
        """Hooks every selectable parameter that trains and has no hook of this optimizer yet."""
        if not self.hooked:
            return
        if not self._handles:
            weakref.finalize(optimizer, _remove, self._handles).atexit = False
        take = partial(_take, weakref.ref(optimizer))
        for group in optimizer.param_groups:
            for p in [] if group["dense"] else group["params"]:
                if p.requires_grad and id(p) not in self._handles:
                    self._handles[id(p)] = p.register_post_accumulate_grad_hook(take)

    def remove_hooks(self) -> None:
        self.hooked = False
        _remove(self._handles)

    def take(self, optimizer: ID3AdamW, param: Tensor) -> None:
        """What a hook does. Never asks a GPU for anything."""
        with self._lock:
            self._enter(optimizer, param)
        self._collect(optimizer, param)

    def take_rest(self, optimizer: ID3AdamW) -> None:
        """At a step: takes the gradients that no hook has taken (assigned by hand, unfrozen since)."""
        if self._root is not None:
            raise RuntimeError(
                "release_gradients: expected passes that ended, got one that failed: call zero_grad()"
            )
        self._prepare(optimizer)
        for group in optimizer.param_groups:
            for p in [] if group["dense"] else group["params"]:
                if p.grad is not None:
                    self._collect(optimizer, p)

    def _collect(self, optimizer: ID3AdamW, param: Tensor) -> None:
        i, j = self._at[id(param)]
        shard, best, heuristic = optimizer._shards[i], self.best[i], optimizer.heuristic
        position, score, d3 = shard.positions[j], None, (0.0, 0.0)
        check_place(optimizer, shard, param, position)
        check_gradient(optimizer, param, position)
        if isinstance(heuristic, D3):
            d3 = heuristic.eps, heuristic.exp
        elif best.score.numel():
            names = optimizer._names()
            score = scores(heuristic, param, param.grad, position, names and names[position])
            best = Best.nobody(0, shard) if score is None else best
        indices, values, seen = shard.arrays["indices"], shard.arrays["gradient"], shard.seen[j]
        again = seen and self.select_from == "max"  # "last" forgets its candidates before each pass
        shard.kernels.collect_(
            param, param.grad, score, shard.offsets[j : j + 2], indices, values, seen, position, *best,
            self._k[i], again, *d3,
        )  # fmt: skip
        shard.seen[j] = True
        param.grad = None

    def check_scaler(self) -> None:
        """Raises RuntimeError where somebody else's GradScaler is at work."""
        if not self.seen_by_scaler:
            raise RuntimeError(
                "release_gradients: torch's GradScaler does not see released gradients (fp16 in the "
                "transformers Trainer and Accelerate uses it): use id3_optim.GradScaler, or bf16"
            )

    # --- passes --------------------------------------------------------------------------------------

    def _enter(self, optimizer: ID3AdamW, param: Tensor) -> None:
        """Begins a new pass where the gradient that comes now is not of the one that runs."""
        task = torch._C._current_graph_task_id()
        again = id(param) in self._in_pass
        if task != self._root:
            if _within_a_backward():
                begins, root = not self._in_pass or (again and self._root is None), None
            else:  # a task that is older than what came so far is the root of it
                begins, root = not self._in_pass or self._root is not None or task > self._first, task
            if begins:
                self._begin_pass(optimizer)
                again, self._first = False, task
            if root is not None:
                self._root = root
                ended = partial(_ended, weakref.ref(self), root)
                torch.autograd.Variable._execution_engine.queue_callback(ended)
        if again:
            i, j = self._at[id(param)]
            name = optimizer._name(optimizer._shards[i].positions[j])
            raise RuntimeError(
                f"release_gradients: {name} received its gradient in two parts in one "
                "backward pass (a tied weight under reentrant checkpoints): use use_reentrant=False"
            )
        self._in_pass.add(id(param))

    def _begin_pass(self, optimizer: ID3AdamW) -> None:
        if self._root is not None:  # it never ended, so a part of its gradients is missing
            optimizer._forget_gradients()
        self._end_pass()
        check_one_process()
        self._prepare(optimizer)
        if self.select_from == "last":
            for best in self.best:
                best.forget()

    def _prepare(self, optimizer: ID3AdamW) -> None:
        """Who is where, and once for each step how many entries are wanted."""
        optimizer._ready()
        shards = optimizer._shards
        self._at = {id(p): (i, j) for i, shard in enumerate(shards) for j, p in enumerate(shard.params)}
        self.attach(optimizer)
        if not self._begun:
            self._wanted, self._begun = optimizer._wanted(), True
            self._k: list[Tensor] = []
        for shard in shards[len(self.best) :]:
            self._k.append(torch.zeros(1, dtype=torch.int64, device=shard.device))
            if self._wanted is not None:
                self._k[-1].copy_(moved(self._wanted.k, shard.device))
            capacity = self._wanted.capacity if self._wanted is not None else 0
            self.best.append(Best.nobody(min(capacity, shard.numel), shard))

    # --- what a step takes ---------------------------------------------------------------------------

    def chosen(
        self, shards: list[Shard], wanted: Wanted
    ) -> tuple[list[Entries], list[Tensor], Tensor, Tensor]:
        """The best entries of each shard and the gradients they were chosen by; what they scored, in order of
        place, and how many they are. Never asks a GPU for anything."""
        if len(shards) == 1:
            return self._chosen_of_one(shards[0], wanted)
        place, score = gathered([(best.place, best.score) for best in self.best], shards[0].device)
        taken = best_of(place, score, wanted.k)
        place, order = torch.where(taken, place, NOBODY).sort()
        score = torch.where(taken, score, 0)[order][: wanted.capacity]
        mine = taken.split([best.score.numel() for best in self.best])
        picked, values = [], []
        for shard, best, here in zip(shards, self.best, mine, strict=True):
            here = moved(here, shard.device)
            new, order = entries_at(shard, torch.where(here, best.place, NOBODY))
            n = min(wanted.capacity, shard.numel)
            picked.append(Entries(new.offsets, new.indices[:n]))
            values.append(best.grad[order][:n])
        return picked, values, score, (place < NOBODY).sum()

    def _chosen_of_one(
        self, shard: Shard, wanted: Wanted
    ) -> tuple[list[Entries], list[Tensor], Tensor, Tensor]:
        """The same for one shard, by a single sort where it holds the best k and nobody else."""
        best, n = self.best[0], min(wanted.capacity, shard.numel)
        exact = shard.device.type == "cpu" and best.score.numel() == n
        taken = best.score > 0 if exact else best_of(best.place, best.score, wanted.k)
        new, order = entries_at(shard, torch.where(taken, best.place, NOBODY))
        order = order[:n]
        score = torch.where(taken, best.score, 0)[order]
        return [Entries(new.offsets, new.indices[:n])], [best.grad[order]], score, taken.sum()

    def scaled_tensors(self, optimizer: ID3AdamW) -> list[Tensor]:
        """All that is proportional to the loss scale, as the tensors (and parts of tensors) that hold it."""
        held = [best.grad for best in self.best]
        if isinstance(optimizer.heuristic, D3):
            held += [best.score for best in self.best]
        return [t for t in held + [shard.released() for shard in optimizer._shards] if t.numel()]


def _take(optimizer: weakref.ref[ID3AdamW], param: Tensor) -> None:
    alive = optimizer()
    if alive is None or alive._release is None:
        return
    if torch.is_grad_enabled():  # create_graph=True
        with torch.no_grad():
            alive._release.take(alive, param)
    else:
        alive._release.take(alive, param)


def _ended(release: weakref.ref[Release], root: int) -> None:
    alive = release()
    if alive is not None and alive._root == root:
        alive._end_pass()


def _remove(handles: dict) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()


def _within_a_backward() -> bool:
    """Whether this pass was started by a Function's own backward, as reentrant checkpoints do."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False

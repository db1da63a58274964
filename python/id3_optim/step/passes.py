"""Which backward pass a hook is called in: hooks of one pass belong together, and autograd does not say so.

A pass is known by autograd's graph task, a number that grows. Reentrant checkpoints run backward passes of
their own inside a pass, with tasks of their own; a look at the Python stack tells these apart.

| the hook's task                      | the parameter's gradient          | meaning                         |
| the root of the running pass         | first in this pass                | the pass goes on                |
| another, not inside another backward | no pass yet, or the root was seen | a new pass                      |
| likewise                             | newer than all tasks so far       | a new pass                      |
| likewise                             | older: tasks inside it came first | this task is the pass's root    |
| another, inside another backward     | first in this pass                | the pass goes on, or a new one  |
| likewise, of another loss            | a second time, root not yet seen  | a new pass                      |
| any                                  | a second time otherwise           | two gradients in one pass: fail |
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.autograd.function import BackwardCFunction


class Passes:
    """The backward pass that is running, as far as the hooks' calls tell."""

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """Forgets the pass that runs."""
        self._root: int | None = None  # the graph task of the running pass, once a hook was called in it
        self._first: int | None = None  # the task in which the pass's first hook was called
        self._loss: weakref.ref | None = None  # what the pass begins at, as far as the Python stack tells
        self._in_pass: set[int] = set()  # the keys that were entered

    @property
    def unfinished(self) -> bool:
        """Whether a pass runs that has not reached its end; outside of a backward pass: one that failed."""
        return self._root is not None

    def enter(self, key: int, begin: Callable[[bool], None], within: int = 0) -> bool:
        """Called in a hook, with a number for its parameter. Returns whether it came in this pass before.

        within: the number of Functions whose backward has called the hook.

        begin(unfinished) is called first where a new pass begins; unfinished: the last one never ended, so a
        part of its gradients is missing.
        """
        task = torch._C._current_graph_task_id()
        repeated = key in self._in_pass
        if task != self._root:
            around, loss = _around()
            if around > within:
                same = self._loss is not None and self._loss() is loss
                again = repeated and self._root is None and not same
                begins, root = not self._in_pass or again, None
            else:
                begins, root = not self._in_pass or self._root is not None or task > self._first, task
            if begins:
                unfinished = self.unfinished
                self.end()
                begin(unfinished)
                repeated, self._first = False, task
                self._loss = None if loss is None else weakref.ref(loss)
            if root is not None:
                self._root = root
                ended = partial(_ended, weakref.ref(self), root)
                torch.autograd.Variable._execution_engine.queue_callback(ended)
        self._in_pass.add(key)
        return repeated

    def end_of(self, root: int) -> None:
        """What autograd calls when the pass of this task is done."""
        if self._root == root:
            self.end()


def _ended(passes: weakref.ref[Passes], root: int) -> None:
    alive = passes()
    if alive is not None:
        alive.end_of(root)


def _around() -> tuple[int, torch.Tensor | None]:
    """In how many Functions' own backward this is called, since reentrant checkpoints start passes in theirs;
    and the first tensor that the outermost `torch.autograd.backward` was given."""
    frame, count, loss = sys._getframe(), 0, None
    while frame is not None:
        count += frame.f_code is BackwardCFunction.apply.__code__
        if frame.f_code is torch.autograd.backward.__code__:
            loss = frame.f_locals["tensors"]
        frame = frame.f_back
    return count, loss[0] if isinstance(loss, Sequence) and loss else loss


def in_two_parts(name: str) -> RuntimeError:
    """For a parameter that one backward pass gives two gradients, of which a hook has taken the first."""
    return RuntimeError(
        f"release_gradients: {name} received its gradient in two parts in one backward pass: for a weight "
        "that is used twice under reentrant checkpoints set use_reentrant=False; with sparse_backward a "
        "weight may be used by its layer alone (a penalty on it: in a backward pass of its own, before the "
        "loss's, since the last pass chooses)"
    )

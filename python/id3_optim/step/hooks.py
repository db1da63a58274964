"""What autograd calls for each parameter whose gradients are released, and how that ends."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor


def take(release: weakref.ref[Any], param: Tensor) -> None:
    """Lets a `Release`, as long as it lives, take the gradient of a parameter."""
    alive = release()
    if alive is None or param.grad is None:  # a Function that gives no gradient calls the hook all the same
        return
    if torch.is_grad_enabled():  # create_graph=True
        with torch.no_grad():
            alive.take(param)
    else:
        alive.take(param)


def take_over(param: Tensor) -> None:
    """Takes the hooks of other optimizers off a parameter: the first of them to run would take its gradient.
    An interrupted run, or a notebook's cell that is run again, leaves such hooks."""
    for hook in list((param._post_accumulate_grad_hooks or {}).values()):
        other = hook.args[0]() if isinstance(hook, partial) and hook.func is take else None
        if other is not None:
            other.detach(param)


def remove(handles: dict[int, torch.utils.hooks.RemovableHandle]) -> None:
    """Removes the hooks of all parameters."""
    for handle in handles.values():
        handle.remove()
    handles.clear()

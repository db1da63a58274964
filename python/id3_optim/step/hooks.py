"""What autograd calls for each parameter whose gradients are released, and how that ends."""

from __future__ import annotations

import weakref
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


def remove(handles: dict[int, torch.utils.hooks.RemovableHandle]) -> None:
    """Removes the hooks of all parameters."""
    for handle in handles.values():
        handle.remove()
    handles.clear()

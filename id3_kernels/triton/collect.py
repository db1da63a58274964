"""What a step needs of one tensor's gradient, kept before the gradient goes. Nothing here asks the device."""

from __future__ import annotations

import torch

from .. import reference
from . import launch
from .score import kind_of
from .selection import select


def collect_(
    param, grad, score, indices, values, add, position, best_score, best_place, best_grad, again, eps, exp
):
    """See the op table. A tensor of other than row-major strides is copied to be read."""
    launch.check(param, grad, score, values)
    grad, n = grad.contiguous(), indices.numel()
    if n:
        here = grad.view(-1)[indices].to(values.dtype)
        values.add_(here) if add else values.copy_(here)
    k = min(best_score.numel(), grad.numel())
    if k == 0:
        return
    offsets = torch.zeros(2, dtype=torch.int64, device=indices.device)
    offsets[1:].fill_(n)
    if score is None:
        found = select([param], [grad], offsets, indices, k, kind_of(exp), eps, exp)
    else:
        found = select([None], [score], offsets, indices, k, "given", 0.0, 0.0)
    index = found[1].to(torch.int64)
    reference.keep_best_(grad, position, index, found[2], best_score, best_place, best_grad, again)

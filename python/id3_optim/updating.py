"""The last part of a step: AdamW on the active entries and on dense groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import gradients
from .dense import make_moments, numbers_of, update_dense
from .shards import Joined, leave
from .state import moved

if TYPE_CHECKING:
    from .optimizer import ID3AdamW


def update(optimizer: ID3AdamW, grads: gradients.Gradients, fine: Tensor | None, joined: Joined) -> None:
    """One AdamW step. If it fails before anything is written, out of memory as a rule, `joined` is undone.

    fine: see `gradients.without_overflow`.
    """
    written = False
    try:
        calls, scalars = _prepared(optimizer, grads, fine)
        for shard, arguments in calls:
            shard.update(*arguments)
            written = True
    except Exception:  # not KeyboardInterrupt, which comes when the call is done
        if not written:
            leave(joined)
        raise
    for group in optimizer.param_groups:
        if group["dense"]:
            update_dense(optimizer.state, group, *scalars)
    for shard, g in zip(optimizer._shards, grads, strict=True):
        shard.count_step(g, optimizer._progress.done + 1, fine)


def _prepared(optimizer: ID3AdamW, grads: gradients.Gradients, fine: Tensor | None) -> tuple[list, tuple]:
    """The calls of `Shard.update`, and (grad_scale, found_inf, clip): all that may fail, made beforehand."""
    for group in optimizer.param_groups:
        if group["dense"]:
            make_moments(optimizer.state, group)
    scale, clip = getattr(optimizer, "grad_scale", None), gradients.clip_coefficient(optimizer, grads)
    scalars, calls = (scale, None if fine is None else optimizer.found_inf, clip), []
    for shard, g in zip(optimizer._shards, grads, strict=True):
        here = [None if x is None else moved(x, shard.device) for x in scalars]
        for part in shard.slices:
            group = optimizer.param_groups[part.group]
            numbers, lr = numbers_of(group, shard.device)
            calls.append((shard, (part, g, *numbers, group["maximize"], *here, lr)))
    return calls, scalars

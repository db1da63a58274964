"""The last part of a step: AdamW on the active entries and on dense groups."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from ..param_groups import numbers_of
from ..state.active_set import ActiveSet, Joined
from .dense import make_moments, update_dense
from .gradients import Kept, Whole, count, counted, squared_norms
from .scaling import Scaling
from .warmup import Warmup


def update(
    active: ActiveSet,
    gradients: list[Whole] | list[Kept],
    groups: list[dict[str, Any]],
    dense_state: MutableMapping[Tensor, dict],
    scaling: Scaling,
    number: int | Tensor,
    joined: Joined,
    entry_warmup: int,
) -> None:
    """One AdamW step, the optimizer's step `number` (the first is 1). entry_warmup: see `ID3AdamW`.

    If it fails before anything is written, out of memory as a rule, `joined` is undone. Mutates the
    parameters at active entries, the state beside these, and the parameters and `dense_state` of dense
    groups.
    """
    written, updated, dense = False, [], [group for group in groups if group["dense"]]
    try:
        for group in dense:
            make_moments(dense_state, group)
        if scaling.max_norm is not None:
            scaling = scaling.clipped(squared_norms(active, gradients, groups))
        calls = []  # all that may fail is made here, before anything is written
        for shard, gradient in zip(active.shards, gradients, strict=True):
            scalars = scaling.on(shard.device)
            for part in shard.slices:
                group = groups[part.group]
                numbers, lr = numbers_of(group, shard.device)
                calls.append((gradient, shard, part, (*numbers, group["maximize"], *scalars, lr)))
            updated.append(counted(gradient, shard, scaling.not_overflowed))
        pairs = zip(active.shards, updated, strict=True)
        warmups = [Warmup(*pair, entry_warmup) for pair in pairs] if entry_warmup else []
        for gradient, *arguments in calls:
            gradient.update(*arguments)
            written = True
    except Exception:  # not KeyboardInterrupt, which comes when the call is done
        if not written:
            active.leave(joined)
        raise
    for warmup in warmups:
        warmup.take_back()
    for group in dense:
        update_dense(dense_state, group, scaling)
    for shard, of_tensors in zip(active.shards, updated, strict=True):
        count(shard, number, of_tensors)

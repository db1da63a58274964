"""The shards of an optimizer: its tensors by device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from id3_kernels import Entries

from .state import Layout, Shard

Joined = list[tuple[Shard, Entries]]


def adopt(shards: list[Shard], param_groups: list[dict[str, Any]], i: int, layout: Layout) -> None:
    """Takes the tensors of param group i into the shards, and makes those that are missing."""
    position = sum(len(group["params"]) for group in param_groups[:i])
    for p in param_groups[i]["params"]:
        shard = next((s for s in shards if (s.device, s.dtype) == (p.device, p.dtype)), None)
        if shard is None:
            shard = Shard(p.device, p.dtype, layout)
            shards.append(shard)
        shard.add(p, position, i)
        position += 1


def reserve(shards: list[Shard], budget: int) -> None:
    """Room for all that may ever be active, where growing would mean to ask a GPU how many there are."""
    for shard in shards:
        shard.limit = min(budget, shard.numel)
        asks = shard.device.type != "cpu" or shard.layout.capturable
        if asks or len(shards) == 1:
            shard.reserve(shard.limit)


def join(shards: list[Shard], picked: list[Entries], gradients: Sequence[Tensor | None]) -> Joined:
    """Makes the entries active, in all shards or, if that fails, in none."""
    joined: Joined = []
    try:
        for shard, new, gradient in zip(shards, picked, gradients, strict=True):
            shard.join(new, gradient)
            joined.append((shard, new))
    except BaseException:
        leave(joined)
        raise
    return joined


def leave(joined: Joined) -> None:
    """Undoes a join whose step has failed, so that the step can be tried again."""
    for shard, new in joined:
        shard.leave(new)


def replace(shards: list[Shard], picked: list[Entries]) -> Joined:
    """Makes the entries the active ones (strategy repeat); nothing of it can be undone."""
    for shard, new in zip(shards, picked, strict=True):
        shard.replace(new)
    return []

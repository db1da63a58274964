"""The shards of an optimizer: its tensors by device and dtype."""

from __future__ import annotations

from typing import Any

from .state import Layout, Shard


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

"""Which entries training may have changed."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import ID3AdamW


class Touched(NamedTuple):
    """Entries of one parameter that training may have changed: indices int32 [n], flat and ascending.

    From `changed_since`, indices is None for a parameter of a dense group: all of it may have changed. The
    tensors are the optimizer's own: clone what is to outlive the next step.
    """

    param: Tensor
    indices: Tensor | None
    originals: Tensor | None  # [n] of the parameter's dtype, the values before they joined


def touched(optimizer: ID3AdamW) -> Iterator[Touched]:
    """See `ID3AdamW.touched`."""
    at = {id(p): (shard, j) for shard in optimizer._shards for j, p in enumerate(shard.params)}
    for group in optimizer.param_groups:
        for p in [] if group["dense"] else group["params"]:
            if id(p) in at:
                shard, j = at[id(p)]
                yield Touched(p, *shard.touched(j))
            else:
                yield Touched(p, torch.empty(0, dtype=torch.int32, device=p.device), None)


def changed_since(optimizer: ID3AdamW, step: int) -> Iterator[Touched]:
    """See `ID3AdamW.changed_since`."""
    if not isinstance(step, numbers.Integral) or not 0 <= step <= optimizer.steps_done:
        raise ValueError(f"step: expected 0 to {optimizer.steps_done} (steps_done), got {step}")
    return _changed_since(optimizer, step)


def _changed_since(optimizer: ID3AdamW, step: int) -> Iterator[Touched]:
    shards = optimizer._shards
    updated_at = {id(p): at for s in shards for p, at in zip(s.params, s.updated_at.tolist(), strict=True)}
    for entry in touched(optimizer):
        if updated_at.get(id(entry.param), 0) > step and entry.indices.numel():
            yield entry
    for group in optimizer.param_groups:
        for p in group["params"] if group["dense"] and optimizer.steps_done > step else []:
            if p in optimizer.state:  # has had a gradient
                yield Touched(p, None, None)

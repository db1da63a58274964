"""The gradients of one step: checked, one list per shard, and the norm that clips them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from id3_kernels import checks

from .state import Shard, moved

if TYPE_CHECKING:
    from .optimizer import ID3AdamW

Gradients = list[list[Tensor | None] | None]  # per shard, one for each of its tensors; None: released


def of_step(optimizer: ID3AdamW) -> Gradients:
    """The gradients per shard, each fit for its parameter, those of dense groups too."""
    grads = [[p.grad for p in shard.params] for shard in optimizer._shards]
    for shard, g in zip(optimizer._shards, grads, strict=True):
        if not _as_usual(shard, g):
            for param, position in zip(shard.params, shard.positions, strict=True):
                check_place(optimizer, shard, param, position)
                check_gradient(optimizer, param, position)
    position = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            if group["dense"]:
                check_gradient(optimizer, param, position)
            position += 1
    return grads if optimizer._release is None else [None for _ in optimizer._shards]


def _as_usual(shard: Shard, grads: list[Tensor | None]) -> bool:
    """Whether nothing has to be looked at one by one. Sets take a fifth of the time of that."""
    given = [g for g in grads if g is not None]
    return (
        {p.dtype for p in shard.params} == {shard.dtype}
        and {p.device for p in shard.params} == {shard.device}
        and {g.dtype for g in given} <= {shard.dtype}
        and {g.layout for g in given} <= {torch.strided}
    )


def check_place(optimizer: ID3AdamW, shard: Shard, param: Tensor, position: int) -> None:
    """Raises ValueError for a parameter that has moved or changed its dtype since the first step."""
    if param.dtype != shard.dtype or param.device != shard.device:
        expected, got = f"{shard.dtype} on {shard.device}", f"{param.dtype} on {param.device}"
        raise ValueError(f"{optimizer._name(position)}: expected {expected} as at the first step, got {got}")


def check_gradient(optimizer: ID3AdamW, param: Tensor, position: int) -> None:
    """Raises ValueError for a gradient that the kernels can not take."""
    g = param.grad
    if g is not None and (g.dtype != param.dtype or g.layout != torch.strided):
        checks.gradient(f"gradient of {optimizer._name(position)}", g, param)


def overflowed(optimizer: ID3AdamW) -> bool:
    """Whether a GradScaler found an overflow; never where the device is left to look (capturable)."""
    found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler sets it around step()
    if found_inf is None or optimizer._layout.capturable:
        return False
    if optimizer._release is not None:
        optimizer._release.check_scaler()
    return bool(found_inf.item())


def without_overflow(optimizer: ID3AdamW) -> Tensor | None:
    """bool [1]: False where this step must change nothing. None: nobody scales, or it was looked at."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None or not optimizer._layout.capturable:
        return None
    return found_inf.reshape(1) == 0


def clip_coefficient(optimizer: ID3AdamW, grads: Gradients) -> Tensor | None:
    """float32 []: min(1, max_grad_norm / (norm + 1e-6)), or None without clipping."""
    if optimizer.max_grad_norm is None:
        return None
    squares = [shard.squared_norm(g) for shard, g in zip(optimizer._shards, grads, strict=True)]
    dense = [p.grad for g in optimizer.param_groups if g["dense"] for p in g["params"] if p.grad is not None]
    squares += [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in dense]
    if not squares:
        return None
    norm = torch.stack([moved(s, squares[0].device) for s in squares]).sum().sqrt()
    scale = getattr(optimizer, "grad_scale", None)  # a GradScaler sets it around step()
    if scale is not None:
        norm = norm / moved(scale, norm.device)
    return (optimizer.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).float()

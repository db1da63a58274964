"""AdamW at the entries alone, tensor by tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..entries import Entries, runs
from .entries import read, write
from .score import exact_sqrt, wide_dtype


def adamw_(params, grads, offsets, indices, exp_avg, exp_avg_sq, master, age, step, *rest):
    for run in runs(offsets):
        values = [
            None if g is None else read(g, i).to(wide_dtype(p.dtype))
            for p, g, i in zip(params, grads, Entries(run, indices).lists(), strict=True)
        ]
        _adamw(params, values, run, indices, exp_avg, exp_avg_sq, master, age, step, *rest)


def adamw_compact_(params, values, offsets, indices, exp_avg, exp_avg_sq, master, age, step, *rest):
    for run in runs(offsets):
        bounds = run.tolist()
        wide = [values[bounds[j] : bounds[j + 1]].to(wide_dtype(p.dtype)) for j, p in enumerate(params)]
        _adamw(params, wide, run, indices, exp_avg, exp_avg_sq, master, age, step, *rest)


def _adamw(
    params, values, offsets, indices, exp_avg, exp_avg_sq, master, age, step,
    lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, clip, tensor_lr,
):  # fmt: skip
    lr = lr if tensor_lr is None else tensor_lr.item()
    if found_inf is not None and found_inf.item() != 0:
        return
    bounds, steps = offsets.tolist(), step.tolist()
    for j, (param, g) in enumerate(zip(params, values, strict=True)):
        own = slice(bounds[j], bounds[j + 1])
        if g is None or own.start == own.stop:
            continue
        if grad_scale is not None:
            g = g / grad_scale.to(g.dtype)
        if clip is not None:
            g = g * clip.to(g.dtype)
        if maximize:
            g = -g
        w = _weight(param, indices[own], None if master is None else master[own])
        w = w * (1 - lr * weight_decay)
        m, v = exp_avg[own], exp_avg_sq[own]
        m.copy_(m + (g - m) * (1 - beta1))
        v.copy_(v * beta2 + (g * (1 - beta2)) * g)
        if age is not None:
            age[own] += 1
        step_size, root = _bias_corrections(steps[j] if age is None else age[own], lr, beta1, beta2, w)
        w = w - (step_size * m) / (exact_sqrt(v) / root + eps)
        write(param, indices[own], w.to(param.dtype))
        if master is not None and param.dtype in (torch.bfloat16, torch.float16):
            master[own] = w


def _weight(param: Tensor, index: Tensor, master: Tensor | None) -> Tensor:
    """The weight to update: the master, or the parameter where it is not the master's rounding."""
    stored = read(param, index)
    w = stored.to(wide_dtype(param.dtype))
    if master is None or param.dtype not in (torch.bfloat16, torch.float16):
        return w
    rounded = master.to(param.dtype)
    same = (rounded == stored) | (rounded.isnan() & stored.isnan())
    return torch.where(same, master, w)


def _bias_corrections(steps: int | Tensor, lr: float, beta1: float, beta2: float, like: Tensor):
    """lr / (1 - beta1^s) and sqrt(1 - beta2^s): in float64, rounded once to the dtype of `like`."""
    if isinstance(steps, int):
        pair = lr / (1 - beta1**steps), math.sqrt(1 - beta2**steps)
        return tuple(torch.tensor(x, dtype=like.dtype, device=like.device) for x in pair)
    # Python and the C++ kernels use pow of the C library; torch's vectorised pow differs by one ulp.
    distinct, which = steps.unique(return_inverse=True)
    pairs = [(lr / (1 - beta1**s), math.sqrt(1 - beta2**s)) for s in distinct.tolist()]
    table = torch.tensor(pairs, dtype=torch.float64, device=like.device).reshape(-1, 2).to(like.dtype)
    return table[which, 0], table[which, 1]

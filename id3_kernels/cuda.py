"""The op table on an NVIDIA GPU through the CUDA C++ kernels of csrc/cuda.

They take row-major tensors of float32, bfloat16 and float16; other strides pass through a copy. Nothing here
waits for the GPU but `union`, which is the reference's, and the first AdamW step with its betas on a device:
once that is done, all can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from . import reference
from .reference.collect import best_by_selection_

union = reference.union
_ops = torch.ops.id3_cuda


def candidate_room(k):
    """See `table.candidate_room`."""
    return tuple(_ops.candidate_room(k))


def _row_major(tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def _refuse_float64(*tensors):
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        raise ValueError("cuda backend: float64 is not supported, use cpu or reference")


def _write_back(tensors, rows):
    """From the row-major copies: all of them, as where the entries are is known to the GPU alone."""
    for row, t in zip(rows, tensors, strict=True):
        if row is not t:
            t.copy_(row)


def d3_score(param, grad, eps, exp):
    """See the op table."""
    _refuse_float64(param)
    return _ops.d3_score(param.contiguous(), grad.contiguous(), eps, exp)


def select_topk(params, grads, offsets, indices, k, capacity, eps, exp):
    """See the op table."""
    _refuse_float64(*params)
    return _ops.select_topk(_row_major(params), _row_major(grads), offsets, indices, k, capacity, eps, exp)


def select_topk_by_score(scores, offsets, indices, k, capacity):
    """See the op table."""
    _refuse_float64(*scores)
    return _ops.select_topk_by_score(_row_major(scores), offsets, indices, k, capacity)


def collect_(
    param, grad, score, offsets, indices, values, add, position, best_score, best_place, best_grad, state, k,
    again, eps, exp,
):  # fmt: skip
    """See the op table."""
    _refuse_float64(param)
    param, grad, score = param.contiguous(), grad.contiguous(), None if score is None else score.contiguous()
    best = best_score, best_place, best_grad
    _ops.collect_(
        param, grad, score, offsets, indices, values, add, position, *best, state, k, again, eps, exp
    )
    room, fused = best_score.numel(), state.numel() > 0
    if (fused and not again) or room == 0:
        return
    best_by_selection_(
        select_topk, select_topk_by_score, param, grad, score, offsets, indices, position, *best, k,
        _ops.most_wanted(room) if fused else room, again, eps, exp,
    )  # fmt: skip
    if fused:
        beyond = torch.arange(room, device=k.device) >= k
        for held, nobody in zip(best, (0, -1, 0), strict=True):
            held.masked_fill_(beyond, nobody)
        state[:1] = (best_place >= 0).sum()


def gather(tensors, offsets, indices):
    """See the op table."""
    return _ops.gather(_row_major(tensors), offsets, indices)


def scatter_(tensors, offsets, indices, values):
    """See the op table."""
    rows = _row_major(tensors)
    _ops.scatter_(rows, offsets, indices, values.contiguous())
    _write_back(tensors, rows)


def squared_norm(tensors, offsets, indices):
    """See the op table."""
    _refuse_float64(*tensors)
    return _ops.squared_norm(_row_major(tensors), offsets, indices)


def join_(arrays, offsets, b_offsets, b_indices, b_values):
    """See the op table. Where an array has no room for all, nothing changes."""
    _ops.join_(arrays, offsets, b_offsets, b_indices, b_values)


def adamw_(params, grads, *rest):
    """See the op table."""
    _refuse_float64(*params)
    rows = _row_major(params)
    _ops.adamw_(rows, _row_major(grads), *rest)
    _write_back(params, rows)


def adamw_compact_(params, values, *rest):
    """See the op table."""
    _refuse_float64(*params)
    rows = _row_major(params)
    _ops.adamw_compact_(rows, values.contiguous(), *rest)
    _write_back(params, rows)

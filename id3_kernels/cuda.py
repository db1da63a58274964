"""The ops of `table.py` on an NVIDIA GPU, through the CUDA C++ kernels of csrc/cuda.

The kernels take row-major tensors of float32, bfloat16 and float16; a tensor of other strides passes through
a copy. `union` and `fingerprint` are the reference's, and synchronise with the GPU; beside them only the
first AdamW step with its betas on a device does. After that step a CUDA graph can capture them all.
"""

from __future__ import annotations

import torch

from . import reference
from .reference.collect import best_by_selection_

union, fingerprint = reference.union, reference.fingerprint
_ops = torch.ops.id3_cuda


def candidate_room(k):
    """See `table.candidate_room`."""
    return tuple(_ops.candidate_room(k))


def _row_major(tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def _refuse_float64(*tensors):
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        raise ValueError("backend: expected 'cpu' or 'reference' for float64 tensors, got 'cuda'")


def _write_back(tensors, rows):
    """Copies every row-major copy back as a whole: only the GPU knows where its entries are."""
    for row, t in zip(rows, tensors, strict=True):
        if row is not t:
            t.copy_(row)


def d3_score(param, grad, eps, exp):
    """See `table.OPS`."""
    _refuse_float64(param)
    return _ops.d3_score(param.contiguous(), grad.contiguous(), eps, exp)


def select_topk(params, grads, offsets, indices, k, capacity, eps, exp):
    """See `table.OPS`."""
    _refuse_float64(*params)
    return _ops.select_topk(_row_major(params), _row_major(grads), offsets, indices, k, capacity, eps, exp)


def select_topk_by_score(scores, offsets, indices, k, capacity):
    """See `table.OPS`."""
    _refuse_float64(*scores)
    return _ops.select_topk_by_score(_row_major(scores), offsets, indices, k, capacity)


def collect_(
    param, grad, score, offsets, indices, values, add, place, best_score, best_place, best_grad, state, k,
    may_hold, eps, exp,
):  # fmt: skip
    """See `table.OPS`."""
    _refuse_float64(param)
    param, grad, score = param.contiguous(), grad.contiguous(), None if score is None else score.contiguous()
    best = best_score, best_place, best_grad
    _ops.collect_(
        param, grad, score, offsets, indices, values, add, place, *best, state, k, may_hold, eps, exp
    )
    slots, fused = best_score.numel(), state.numel() > 0
    if (fused and not may_hold) or slots == 0:
        return
    best_by_selection_(
        select_topk, select_topk_by_score, param, grad, score, offsets, indices, place, *best, k,
        _ops.most_wanted(slots) if fused else slots, may_hold, eps, exp,
    )  # fmt: skip
    if fused:
        beyond = torch.arange(slots, device=k.device) >= k
        for held, empty in zip(best, (0, -1, 0), strict=True):
            held.masked_fill_(beyond, empty)
        state[:1] = (best_place >= 0).sum()


def gather(tensors, offsets, indices):
    """See `table.OPS`."""
    return _ops.gather(_row_major(tensors), offsets, indices)


def scatter_(tensors, offsets, indices, values):
    """See `table.OPS`."""
    rows = _row_major(tensors)
    _ops.scatter_(rows, offsets, indices, values.contiguous())
    _write_back(tensors, rows)


def squared_norm(tensors, offsets, indices):
    """See `table.OPS`."""
    _refuse_float64(*tensors)
    return _ops.squared_norm(_row_major(tensors), offsets, indices)


def sampled_weight_grad_(left, right, offsets, indices, values, add):
    """See `table.OPS`."""
    _refuse_float64(left)
    _ops.sampled_weight_grad_(left, right, offsets, indices, values, add)


def sampled_embedding_grad_(grad, ids, offsets, indices, values, add):
    """See `table.OPS`."""
    _refuse_float64(grad)
    _ops.sampled_embedding_grad_(grad, ids.contiguous(), offsets, indices, values, add)


def join_(arrays, offsets, b_offsets, b_indices, b_values):
    """See `table.OPS`. Where an array lacks the capacity for both sets, nothing changes."""
    _ops.join_(arrays, offsets, b_offsets, b_indices, b_values)


def adamw_(params, grads, *rest):
    """See `table.OPS`."""
    _refuse_float64(*params)
    rows = _row_major(params)
    _ops.adamw_(rows, _row_major(grads), *rest)
    _write_back(params, rows)


def adamw_compact_(params, values, *rest):
    """See `table.OPS`."""
    _refuse_float64(*params)
    rows = _row_major(params)
    _ops.adamw_compact_(rows, values.contiguous(), *rest)
    _write_back(params, rows)

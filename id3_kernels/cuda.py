"""The op table on an NVIDIA GPU through the CUDA C++ kernels of csrc/cuda.

They take row-major tensors of float32, bfloat16 and float16; other strides pass through a copy. Nothing here
waits for the GPU but `union`, which is the reference's, and writing back through a copy.
"""

from __future__ import annotations

import torch

from . import reference
from .collect import collect_by_selection_
from .entries import write_back

union = reference.union
_ops = torch.ops.id3_cuda


def _row_major(tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def _refuse_float64(*tensors):
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        raise ValueError("cuda backend: float64 is not supported, use cpu or reference")


def d3_score(param, grad, eps, exp):
    """See the op table."""
    _refuse_float64(param)
    return _ops.d3_score(param.contiguous(), grad.contiguous(), eps, exp)


def select_topk(params, grads, offsets, indices, k, eps, exp):
    """See the op table."""
    _refuse_float64(*params)
    return _ops.select_topk(_row_major(params), _row_major(grads), offsets, indices, k, eps, exp)


def select_topk_by_score(scores, offsets, indices, k):
    """See the op table."""
    _refuse_float64(*scores)
    return _ops.select_topk_by_score(_row_major(scores), offsets, indices, k)


def collect_(param, *rest):
    """See the op table."""
    _refuse_float64(param)
    collect_by_selection_(select_topk, select_topk_by_score, param, *rest)


def gather(tensors, offsets, indices):
    """See the op table."""
    return _ops.gather(_row_major(tensors), offsets, indices)


def scatter_(tensors, offsets, indices, values):
    """See the op table."""
    rows = _row_major(tensors)
    _ops.scatter_(rows, offsets, indices, values.contiguous())
    write_back(tensors, rows, offsets, indices)


def squared_norm(tensors, offsets, indices):
    """See the op table."""
    _refuse_float64(*tensors)
    return _ops.squared_norm(_row_major(tensors), offsets, indices)


def join_(arrays, offsets, b_offsets, b_indices):
    """See the op table."""
    return _ops.join_(arrays, offsets, b_offsets, b_indices)


def adamw_(params, grads, *rest):
    """See the op table."""
    _refuse_float64(*params)
    rows = _row_major(params)
    _ops.adamw_(rows, _row_major(grads), *rest)
    write_back(params, rows, *rest[:2])


def adamw_compact_(params, values, *rest):
    """See the op table."""
    _refuse_float64(*params)
    rows = _row_major(params)
    _ops.adamw_compact_(rows, values.contiguous(), *rest)
    write_back(params, rows, *rest[:2])

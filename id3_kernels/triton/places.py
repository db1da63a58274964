"""Where entries lie: the tensor of each, and the runs of an active set. Kernels find both themselves.

A search takes log2(M) loads of offsets, which stay in the caches. A table of owners would be as long as the
active set and cost three launches more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def runs_of(offsets: Tensor) -> tuple[int, int]:
    """(how many runs, how far their rows lie apart) of offsets [M + 1] or [R, M + 1]."""
    return (offsets.shape[0], offsets.stride(0)) if offsets.dim() == 2 else (1, 0)


@triton.jit
def owner_of(offsets, n_tensors, at):
    """int32: the tensor j with offsets[j] <= at < offsets[j + 1]; n_tensors behind the last entry.

    at: int64, not below offsets[0].
    """
    step = 1
    while step * 2 <= n_tensors:
        step *= 2
    j = tl.zeros_like(at).to(tl.int32)
    while step > 0:
        further = j + step
        begin = tl.load(offsets + further, mask=further <= n_tensors, other=0)
        j = tl.where((further <= n_tensors) & (begin <= at), further, j)
        step = step // 2
    return j


@triton.jit
def lower_bound(values, low, high, wanted):
    """int64: of each lane the first place in low … high whose value is not below `wanted`."""
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        inside = low < high
        value = tl.load(values + middle, mask=inside, other=0)
        low = tl.where(inside & (value < wanted), middle + 1, low)
        high = tl.where(inside & (value >= wanted), middle, high)
    return low


@triton.jit
def run_of(offsets, stride, n, BLOCK: tl.constexpr):
    """(the offsets of this program's run, int64 the first place of its BLOCK places).

    A run has at most n entries and cdiv(n, BLOCK) programs.
    """
    blocks = tl.cdiv(n, BLOCK)
    own = offsets + (tl.program_id(0) // blocks).to(tl.int64) * stride
    return own, tl.load(own) + (tl.program_id(0) % blocks).to(tl.int64) * BLOCK

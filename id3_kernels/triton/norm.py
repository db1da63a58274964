"""The squared norm: float32 values are gathered once, then squared as integers, whose sum has no order.

`csrc/formulas/norm.h` has the formula and its error bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..entries import runs
from ..reference.norm import norm_scale, norm_total
from . import launch, tables
from .launch import load_any
from .tables import owners

BLOCK = 256
SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["n", "n_tensors"])  # else a new size compiles anew
def take_values_kernel(tensors, codes, owner, offsets, indices, values, n, n_tensors, BLOCK: tl.constexpr):
    """float32 values at the entries of one run, at the entries' places."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(owner + place, mask=place < n, other=n_tensors)
    held = j < n_tensors
    source = tl.load(tensors + j, mask=held, other=0)
    held = held & (source != 0)
    at = tl.load(offsets) + place
    index = tl.load(indices + at, mask=held, other=0)
    x = load_any(source, index, held, tl.load(codes + j, mask=held, other=0))
    tl.store(values + at, x, mask=held)


@triton.jit(do_not_specialize=["n"])  # else a new size compiles anew
def squares_kernel(values, inverse, sums, n, BLOCK: tl.constexpr):
    """sums [2, programs]: of the squares in units of 2^-29, and of what is left in units of 2^-60."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + at, mask=at < n, other=0.0)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    scaled = x.to(tl.float64) * tl.load(inverse)
    units = scaled * scaled * 536870912.0
    high = units.to(tl.int64)
    low = ((units - high.to(tl.float64)) * 2147483648.0).to(tl.int64)
    tl.store(sums + tl.program_id(0), tl.sum(high))
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(low))


def squared_norm(tensors, offsets, indices):
    """See the op table. A tensor of other than row-major strides is copied to be read."""
    launch.check(*tensors)
    device, n = offsets.device, tables.most_entries(tensors, indices)
    rows = [None if t is None else t.contiguous() for t in tensors]
    values = torch.zeros(indices.numel(), dtype=torch.float32, device=device)
    for run in runs(offsets):
        launch.run(
            take_values_kernel, triton.cdiv(n, BLOCK), 4, device, tables.addresses(rows, device),
            tables.codes(rows, device), owners(run, n), run, indices, values, n, len(rows), BLOCK,
        )  # fmt: skip
    # As bits: the order of NaN, infinities and numbers, and no subnormal that a GPU's maximum could drop.
    bits = values.view(torch.int32) & 0x7FFFFFFF
    largest = (bits.amax() if bits.numel() else bits.sum(dtype=torch.int32)).view(torch.float32).double()
    scale = norm_scale(largest)
    programs = triton.cdiv(values.numel(), SUM_BLOCK)
    sums = torch.zeros(2, programs, dtype=torch.int64, device=device)
    launch.run(squares_kernel, programs, 4, device, values, 1 / scale, sums, values.numel(), SUM_BLOCK)
    return norm_total(largest, *sums.sum(1), scale)

"""The squared norm: float32 values are gathered once, then squared as integers, whose sum has no order.

`csrc/formulas/norm.h` has the formula and its error bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch, tables
from .launch import load_any
from .places import owner_of, run_of, runs_of

BLOCK = 1024


@triton.jit(do_not_specialize=["stride", "n", "n_tensors"])  # else a new size compiles anew
def take_values_kernel(
    tensors, codes, offsets, stride, indices, values, sums, n, n_tensors, BLOCK: tl.constexpr
):
    """float32 values at the entries' places; sums[0] becomes the largest magnitude's bits.

    By their bits NaN is above infinity and that above all numbers, and no subnormal is lost.
    """
    own, first = run_of(offsets, stride, n, BLOCK)
    if first >= tl.load(own + n_tensors):
        return
    at = first + tl.arange(0, BLOCK)
    j = owner_of(own, n_tensors, at)
    held = j < n_tensors
    source = tl.load(tensors + j, mask=held, other=0)
    there = held & (source != 0)
    index = tl.load(indices + at, mask=there, other=0)
    x = load_any(source, index, there, tl.load(codes + j, mask=there, other=0))
    tl.store(values + at, x, mask=held)
    bits = tl.where(there, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    tl.atomic_max(sums, tl.max(bits).to(tl.int64), sem="relaxed")


@triton.jit
def scale_of(bits):
    """float64: the largest power of two up to the float32 with these bits, at least 2^-1022."""
    largest = bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
    exponent = largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    return tl.maximum(exponent, 0x0010000000000000).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["stride", "n", "n_tensors"])  # else a new size compiles anew
def squares_kernel(values, offsets, stride, sums, n, n_tensors, BLOCK: tl.constexpr):
    """Adds to sums[1] the squares in units of 2^-29, to sums[2] what is left in units of 2^-60."""
    own, first = run_of(offsets, stride, n, BLOCK)
    end = tl.load(own + n_tensors)
    if first >= end:
        return
    at = first + tl.arange(0, BLOCK)
    x = tl.load(values + at, mask=at < end, other=0.0)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    scaled = x.to(tl.float64) * (1.0 / scale_of(tl.load(sums)))
    units = scaled * scaled * 536870912.0
    high = units.to(tl.int64)
    low = ((units - high.to(tl.float64)) * 2147483648.0).to(tl.int64)
    tl.atomic_add(sums + 1, tl.sum(high), sem="relaxed")
    tl.atomic_add(sums + 2, tl.sum(low), sem="relaxed")


@triton.jit
def total_kernel(sums, total):
    """`norm_total` of the reference."""
    largest, high, low = tl.load(sums), tl.load(sums + 1), tl.load(sums + 2)
    scale = scale_of(largest)
    units = high.to(tl.float64) + low.to(tl.float64) * 4.656612873077393e-10
    finite = units * 1.862645149230957e-9 * scale * scale
    beyond = tl.where(largest > 0x7F800000, float("nan"), float("inf"))
    tl.store(total, tl.where(largest < 0x7F800000, finite, beyond))


def squared_norm(tensors, offsets, indices):
    """See the op table. A tensor of other than row-major strides is copied to be read."""
    launch.check(*tensors)
    device, n = offsets.device, tables.most_entries(tensors, indices)
    rows = [None if t is None else t.contiguous() for t in tensors]
    values = torch.empty(indices.numel(), dtype=torch.float32, device=device)
    sums = torch.zeros(3, dtype=torch.int64, device=device)
    n_runs, stride = runs_of(offsets)
    programs, of_runs = n_runs * triton.cdiv(n, BLOCK), (offsets, stride)
    launch.run(
        take_values_kernel, programs, 4, device, tables.addresses(rows, device), tables.codes(rows, device),
        *of_runs, indices, values, sums, n, len(rows), BLOCK,
    )  # fmt: skip
    launch.run(squares_kernel, programs, 4, device, values, *of_runs, sums, n, len(rows), BLOCK)
    total = torch.empty((), dtype=torch.float64, device=device)
    launch.run(total_kernel, 1, 1, device, sums, total)
    return total

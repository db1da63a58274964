"""Values at the entries, and sets of entries: one launch where the reference loops over the tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..entries import Entries, sort_keys, write_back
from . import launch
from .launch import load_any, owners

BLOCK = 256
SUM_BLOCK = 4096  # fixed, so that the sum has one order

union = reference.union


@triton.jit
def gather_kernel(tensors, owner, indices, values, n, n_tensors, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(owner + at, mask=at < n, other=n_tensors)
    held = j < n_tensors
    source = tl.load(tensors + j, mask=held, other=0).to(tl.pointer_type(BITS))
    index = tl.load(indices + at, mask=held, other=0)
    tl.store(values + at, tl.load(source + index, mask=held, other=0), mask=held)


@triton.jit
def scatter_kernel(tensors, owner, indices, values, n, n_tensors, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(owner + at, mask=at < n, other=n_tensors)
    held = j < n_tensors
    target = tl.load(tensors + j, mask=held, other=0).to(tl.pointer_type(BITS))
    index = tl.load(indices + at, mask=held, other=0)
    tl.store(target + index, tl.load(values + at, mask=held, other=0), mask=held)


@triton.jit
def squares_kernel(tensors, codes, owner, indices, squares, n, n_tensors, BLOCK: tl.constexpr):
    """float64 squares; 0 where there is no tensor (address 0) and behind the last entry."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(owner + at, mask=at < n, other=n_tensors)
    held = j < n_tensors
    source = tl.load(tensors + j, mask=held, other=0)
    held = held & (source != 0)
    index = tl.load(indices + at, mask=held, other=0)
    x = load_any(source, index, held, tl.load(codes + j, mask=held, other=0)).to(tl.float64)
    tl.store(squares + at, x * x, mask=at < n)


def _bits(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The integers as wide as dtype, by torch's and Triton's name: values are moved by their bits."""
    known = {2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32), 8: (torch.int64, tl.int64)}
    return known[dtype.itemsize]


def gather(tensors, offsets, indices):
    """See the op table. A tensor of other than row-major strides is copied to be read."""
    launch.check(*tensors, float64=True)
    device, n = offsets.device, indices.numel()
    dtype = tensors[0].dtype if tensors else torch.float32
    rows = [t.contiguous() for t in tensors]
    values = torch.empty(n, dtype=dtype, device=device)
    as_torch, as_triton = _bits(dtype)
    launch.run(
        gather_kernel, triton.cdiv(n, BLOCK), 4, device, launch.addresses(rows, device), owners(offsets, n),
        indices, values.view(as_torch), n, len(rows), as_triton, BLOCK,
    )  # fmt: skip
    return values


def scatter_(tensors, offsets, indices, values):
    """See the op table. A tensor of other than row-major strides passes through a copy."""
    launch.check(*tensors, values, float64=True)
    device, n = offsets.device, indices.numel()
    rows = [t.contiguous() for t in tensors]
    as_torch, as_triton = _bits(values.dtype)
    launch.run(
        scatter_kernel, triton.cdiv(n, BLOCK), 4, device, launch.addresses(rows, device), owners(offsets, n),
        indices, values.contiguous().view(as_torch), n, len(rows), as_triton, BLOCK,
    )  # fmt: skip
    write_back(tensors, rows, offsets, indices)


def squared_norm(tensors, offsets, indices):
    """See the op table. One order of summation: blocks of 4096 entries, then the blocks."""
    launch.check(*tensors)
    device, n = offsets.device, indices.numel()
    rows = [None if t is None else t.contiguous() for t in tensors]
    squares = torch.zeros(-(-n // SUM_BLOCK) * SUM_BLOCK, dtype=torch.float64, device=device)
    launch.run(
        squares_kernel, triton.cdiv(n, BLOCK), 4, device, launch.addresses(rows, device),
        launch.codes(rows, device), owners(offsets, n), indices, squares, n, len(rows), BLOCK,
    )  # fmt: skip
    sums = squares.view(-1, SUM_BLOCK).sum(1)
    return sums.cumsum(0)[-1] if n else squares.sum()


def join_(arrays: list[Tensor], offsets: Tensor, b_offsets: Tensor, b_indices: Tensor) -> Tensor:
    """See the op table. Synchronises once, to know both counts."""
    n, n_new = torch.stack([offsets[-1], b_offsets[-1]]).tolist()
    held, new = sort_keys(Entries(offsets, arrays[0]), n), sort_keys(Entries(b_offsets, b_indices), n_new)
    moved = torch.searchsorted(new, held) + torch.arange(n, device=held.device)
    position = torch.searchsorted(held, new) + torch.arange(n_new, device=held.device)
    for array in arrays:
        old = array[:n].clone()
        array[: n + n_new].zero_()
        array[moved] = old
    arrays[0][position] = b_indices[:n_new]
    offsets.add_(b_offsets)
    out = b_offsets.new_zeros(b_indices.numel())
    out[:n_new] = position
    return out

"""Values at entries, and sets of entries: one launch for all tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..entries import Entries, sort_keys
from . import launch, tables
from .tables import owners

BLOCK = 256

union = reference.union


@triton.jit(do_not_specialize=["n", "n_tensors"])  # else a new size compiles anew
def gather_kernel(tensors, owner, indices, values, n, n_tensors, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(owner + at, mask=at < n, other=n_tensors)
    held = j < n_tensors
    source = tl.load(tensors + j, mask=held, other=0).to(tl.pointer_type(BITS))
    index = tl.load(indices + at, mask=held, other=0)
    tl.store(values + at, tl.load(source + index, mask=held, other=0), mask=held)


@triton.jit(do_not_specialize=["n", "n_tensors"])  # else a new size compiles anew
def scatter_kernel(tensors, owner, indices, values, n, n_tensors, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(owner + at, mask=at < n, other=n_tensors)
    held = j < n_tensors
    target = tl.load(tensors + j, mask=held, other=0).to(tl.pointer_type(BITS))
    index = tl.load(indices + at, mask=held, other=0)
    tl.store(target + index, tl.load(values + at, mask=held, other=0), mask=held)


def _bits(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The integer dtype of dtype's size, of torch and of Triton: values are moved by their bits."""
    known = {2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32), 8: (torch.int64, tl.int64)}
    return known[dtype.itemsize]


def gather(tensors, offsets, indices):
    """See `table.OPS`. A tensor whose strides are not row-major is read through a copy."""
    launch.check(*tensors, float64=True)
    device, n = offsets.device, indices.numel()
    dtype = tensors[0].dtype if tensors else torch.float32
    rows = [t.contiguous() for t in tensors]
    values = torch.zeros(n, dtype=dtype, device=device)
    as_torch, as_triton = _bits(dtype)
    launch.run(
        gather_kernel, triton.cdiv(n, BLOCK), 4, device, tables.addresses(rows, device), owners(offsets, n),
        indices, values.view(as_torch), n, len(rows), as_triton, BLOCK,
    )  # fmt: skip
    return values


def scatter_(tensors, offsets, indices, values):
    """See `table.OPS`. A tensor whose strides are not row-major passes through a copy."""
    launch.check(*tensors, values, float64=True)
    device, n = offsets.device, indices.numel()
    rows = [t.contiguous() for t in tensors]
    as_torch, as_triton = _bits(values.dtype)
    launch.run(
        scatter_kernel, triton.cdiv(n, BLOCK), 4, device, tables.addresses(rows, device), owners(offsets, n),
        indices, values.contiguous().view(as_torch), n, len(rows), as_triton, BLOCK,
    )  # fmt: skip
    launch.carry_back(tensors, rows)


def join_(arrays, offsets, b_offsets, b_indices, b_values):
    """See `table.OPS`. Each place of an array gathers its value, so the host needs no count."""
    if b_indices.numel():
        room = max(array.numel() for array in arrays)
        is_new, from_new, from_held = _sources(
            Entries(offsets, arrays[0]), Entries(b_offsets, b_indices), room
        )
        for array, values in zip(arrays, [b_indices, *b_values], strict=True):
            n = array.numel()
            joining = array.new_zeros(()) if values is None else values[from_new[:n]]
            array.copy_(torch.where(is_new[:n], joining, array[from_held[:n]]))
    offsets.add_(b_offsets)


def _sources(held: Entries, new: Entries, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per place of the joined entries: whether it is a new entry's, its place in `new`, its place in `held`.

    Padding stays where it is.
    """
    held_keys, new_keys = _padded_keys(held), _padded_keys(new)
    places = torch.arange(room, device=new_keys.device)
    rank = torch.arange(new_keys.numel(), device=new_keys.device)
    target = torch.searchsorted(held_keys, new_keys) + rank
    target = torch.where(rank < new.offsets[-1], target, room)
    before = torch.searchsorted(target, places, right=True)  # new entries up to and at this place
    from_new = (before - 1).clamp(min=0)
    is_new = target[from_new] == places
    inside = places < held.offsets[-1] + new.offsets[-1]
    return is_new, from_new, torch.where(inside & ~is_new, places - before, places)


def _padded_keys(entries: Entries) -> Tensor:
    """int64: `sort_keys` of the entries, and a larger sentinel for padding."""
    n = entries.indices.numel()
    keys = sort_keys(entries, n)
    return torch.where(torch.arange(n, device=keys.device) < entries.offsets[-1], keys, 1 << 62)

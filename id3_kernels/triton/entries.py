"""Values at entries, and sets of entries: one launch for all tensors, two for all arrays of a join."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch, tables
from .places import lower_bound, owner_of

BLOCK = 256


@triton.jit(do_not_specialize=["n", "n_tensors"])  # else a new size compiles anew
def gather_kernel(tensors, offsets, indices, values, n, n_tensors, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros behind the last entry."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = owner_of(offsets, n_tensors, at)
    held = j < n_tensors
    source = tl.load(tensors + j, mask=held, other=0).to(tl.pointer_type(BITS))
    index = tl.load(indices + at, mask=held, other=0)
    tl.store(values + at, tl.load(source + index, mask=held, other=0), mask=at < n)


@triton.jit(do_not_specialize=["n_tensors"])  # else a new size compiles anew
def scatter_kernel(tensors, offsets, indices, values, n_tensors, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = owner_of(offsets, n_tensors, at)
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
    values = torch.empty(n, dtype=dtype, device=device)
    as_torch, as_triton = _bits(dtype)
    launch.run(
        gather_kernel, triton.cdiv(n, BLOCK), 4, device, tables.addresses(rows, device), offsets, indices,
        values.view(as_torch), n, len(rows), as_triton, BLOCK,
    )  # fmt: skip
    return values


def scatter_(tensors, offsets, indices, values):
    """See `table.OPS`. A tensor whose strides are not row-major passes through a copy."""
    launch.check(*tensors, values, float64=True)
    device = offsets.device
    rows = [t.contiguous() for t in tensors]
    as_torch, as_triton = _bits(values.dtype)
    launch.run(
        scatter_kernel, triton.cdiv(indices.numel(), BLOCK), 4, device, tables.addresses(rows, device),
        offsets, indices, values.contiguous().view(as_torch), len(rows), as_triton, BLOCK,
    )  # fmt: skip
    launch.carry_back(tensors, rows)


# --- join ----------------------------------------------------------------------------------------------


@triton.jit
def copy_bits(to, to_place, source, place, inside, BITS: tl.constexpr):
    there = inside & (source + tl.zeros_like(place) != 0)
    bits = tl.load(source.to(tl.pointer_type(BITS)) + place, mask=there, other=0)
    tl.store(to.to(tl.pointer_type(BITS)) + to_place, bits, mask=inside)


@triton.jit
def copy_items(to, to_place, source, place, inside, item_bytes):
    """Items of 1, 2, 4 or 8 bytes from the address `source` (0: zeros) to the address `to`."""
    if item_bytes == 1:
        copy_bits(to, to_place, source, place, inside, tl.int8)
    if item_bytes == 2:
        copy_bits(to, to_place, source, place, inside, tl.int16)
    if item_bytes == 4:
        copy_bits(to, to_place, source, place, inside, tl.int32)
    if item_bytes == 8:
        copy_bits(to, to_place, source, place, inside, tl.int64)


@triton.jit
def place_among(at, offsets, indices, n_tensors, other_offsets, other_indices):
    """(int64: the places in the union of the entries at `at` of one set, whether there are such entries)."""
    j = owner_of(offsets, n_tensors, at)
    inside = j < n_tensors
    low = tl.load(other_offsets + j, mask=inside, other=0)
    high = tl.load(other_offsets + j + 1, mask=inside, other=0)
    index = tl.load(indices + at, mask=inside, other=0)
    return at + lower_bound(other_indices, low, high, index), inside


@triton.jit(
    do_not_specialize=["n_arrays", "n_tensors", "room", "room_added"]
)  # else a new size compiles anew
def spread_kernel(
    arrays, item_bytes, offsets, b_offsets, b_indices, joined, n_arrays, n_tensors, room, room_added,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every entry to its new place in the scratch arrays. joined: how many there will be, 0 for no change.

    arrays: three addresses for each array: its own, of its scratch, of the values that join.
    """
    held, added = tl.load(offsets + n_tensors), tl.load(b_offsets + n_tensors)
    total = held + added
    total = tl.where((added <= 0) | (added > room_added) | (total > room), 0, total)
    if tl.program_id(0) == 0:
        tl.store(joined, total)
    blocks = tl.cdiv(room, BLOCK)
    stays = tl.program_id(0) < blocks
    first = (tl.program_id(0) - tl.where(stays, 0, blocks)).to(tl.int64) * BLOCK
    if (total == 0) | (first >= tl.where(stays, held, added)):
        return
    at = first + tl.arange(0, BLOCK)
    indices = tl.load(arrays).to(tl.pointer_type(tl.int32))
    if stays:
        place, inside = place_among(at, offsets, indices, n_tensors, b_offsets, b_indices)
    else:
        place, inside = place_among(at, b_offsets, b_indices, n_tensors, offsets, indices)
    for a in range(0, n_arrays):
        source = tl.load(arrays + 3 * a + tl.where(stays, 0, 2))
        copy_items(tl.load(arrays + 3 * a + 1), place, source, at, inside, tl.load(item_bytes + a))


@triton.jit(do_not_specialize=["n_arrays", "n_tensors"])  # else a new size compiles anew
def copy_back_kernel(
    arrays, item_bytes, offsets, b_offsets, joined, n_arrays, n_tensors, BLOCK: tl.constexpr
):
    total = tl.load(joined)
    if total == 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for a in range(0, n_arrays):
        array, scratch = tl.load(arrays + 3 * a), tl.load(arrays + 3 * a + 1)
        copy_items(array, at, scratch, at, at < total, tl.load(item_bytes + a))
    own = at <= n_tensors
    added = tl.load(b_offsets + at, mask=own, other=0)
    tl.store(offsets + at, tl.load(offsets + at, mask=own, other=0) + added, mask=own)


def join_(arrays, offsets, b_offsets, b_indices, b_values):
    """See `table.OPS`. Where an array lacks the capacity for both sets, nothing changes."""
    if not b_indices.numel():
        return
    device, room, n_tensors = offsets.device, min(a.numel() for a in arrays), offsets.numel() - 1
    values = [None if v is None else v.contiguous() for v in (b_indices, *b_values)]
    for array, v in zip(arrays, values, strict=True):  # bits are moved
        if v is not None and v.dtype != array.dtype:
            raise ValueError(f"b_values: expected {array.dtype}, got {v.dtype}")
    scratch = [torch.empty_like(a) for a in arrays]
    rows = [t for row in zip(arrays, scratch, values, strict=True) for t in row]
    item_bytes = tables.table(tuple(a.element_size() for a in arrays), device)
    moved, joined = tables.addresses(rows, device), torch.empty_like(offsets[:1])
    launch.run(
        spread_kernel, triton.cdiv(room, BLOCK) + triton.cdiv(b_indices.numel(), BLOCK), 4, device, moved,
        item_bytes, offsets, b_offsets, b_indices, joined, len(arrays), n_tensors, room, b_indices.numel(),
        BLOCK,
    )  # fmt: skip
    launch.run(
        copy_back_kernel, triton.cdiv(max(room, n_tensors + 1), BLOCK), 4, device, moved, item_bytes, offsets,
        b_offsets, joined, len(arrays), n_tensors, BLOCK,
    )  # fmt: skip

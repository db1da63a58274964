"""Exact top-k by tile maxima: one streaming pass over (θ, g), then a second pass over k tiles.

The k largest scores lie in the k tiles with the largest maxima (ties to the lowest tile). Each entry of any
other tile loses against the maxima of those k tiles: they have a larger score, or the same score at a lower
place. Both passes use the same IEEE arithmetic, so no margin is needed. A bitmap of N bits leaves out active
entries; each call clears and fills it: 1/8 byte an entry, 3 % of a bfloat16 read of θ and g.

k lies on the device: each kernel that would read all entries reads k first, and returns if it is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables
from .launch import TILE, load_wide
from .places import owner_of, run_of, runs_of
from .score import HIGH_KEY, QUICK_KINDS, d3, exponent, key, kind_of, normal_key, quick_bounds, quick_d3
from .tables import Layout, Span
from .topk import Reading, best_entries

ROWS = 2  # tiles in flight per warp: 4 need more than 64 registers with IEEE division
MANY = 4  # for k above 1/4 of the tiles a first pass would spare too little of the second


@triton.jit
def max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_tiles(
    grad, param, at, inside, bits, reads, KIND: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
    FULL: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """(g, θ) of [ROWS, lanes, 8]; g is 0 at the active entries, whose bits are at `bits` [ROWS, lanes]."""
    g = load_wide(grad, at, inside, GRAD, FULL)
    if EXCLUDE:
        taken = (tl.load(bits) if FULL else tl.load(bits, mask=reads, other=0)).to(tl.int32)
        g = tl.where(taken[:, :, None] & (1 << tl.arange(0, 8))[None, None, :] != 0, 0.0, g)
    theta = g
    if (KIND != "g") & (KIND != "given"):
        theta = load_wide(param, at, inside, PARAM, FULL)
    return g, theta


@triton.jit
def store_tiles(pointers, highest, inside, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, highest)
    else:
        tl.store(pointers, highest, mask=inside)


@triton.jit
def quick_maxima(g, theta, eps, widest, KIND: tl.constexpr):
    """Of [ROWS, lanes, 8]: per row the bits of the largest quick score; of a NaN where a d is too wide."""
    d = tl.abs(theta) + eps
    best = tl.reduce(tl.abs(quick_d3(g, d, KIND)), 2, max_or_nan)
    best = tl.where(tl.reduce(d, 2, max_or_nan) > widest, float("nan"), best)
    return tl.max(best.to(tl.int32, bitcast=True), 1)


@triton.jit
def maxima_of(g, theta, eps, exponent, KIND: tl.constexpr):
    """Of [ROWS, lanes, 8]: the largest key of each row."""
    if KIND != "given":
        g = tl.abs(g)
    best = key(d3(g, theta, eps, exponent, KIND), g)
    return normal_key(tl.max(tl.max(best, 2), 1))


@triton.jit
def chunk_of(
    params, grads, owners, tiles, offsets, lengths, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The chunk: pointers, first tile, length; of an iteration the rows, entries and bytes of the mask."""
    c = tl.program_id(0)
    owner = tl.load(owners + c)
    start = tl.multiple_of(tl.load(offsets + c), TILE)
    param = tl.load(params + owner) + start * (4 if PARAM == 0 else 2)
    grad = tl.load(grads + owner) + start * (4 if GRAD == 0 else 2)
    tile = tl.load(tiles + c)
    length = CHUNK if FULL else tl.load(lengths + c)
    row, lane, at = tl.arange(0, ROWS), tl.arange(0, TILE // 8), tl.arange(0, 8)
    within = row[:, None, None] * TILE + lane[None, :, None] * 8 + at[None, None, :]
    byte = tile * (TILE // 8) + row[:, None] * (TILE // 8) + lane[None, :]
    return param, grad, tile, length, row, within, byte


@triton.jit
def score_again(
    again, params, grads, owners, tiles, offsets, lengths, active, maxima, eps, exponent,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
    FULL: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """The iterations of `tile_maxima_kernel` whose bit is set in `again`, by IEEE arithmetic."""
    param, grad, tile, length, row, within, byte = chunk_of(
        params, grads, owners, tiles, offsets, lengths, CHUNK, ROWS, PARAM, GRAD, FULL
    )
    i = 0
    while again != 0:
        if again & 1 != 0:
            reads = (i + row * TILE < length)[:, None]
            g, theta = load_tiles(
                grad, param, i + within, i + within < length, active + i // 8 + byte, reads, KIND, PARAM,
                GRAD, FULL, EXCLUDE,
            )  # fmt: skip
            highest = maxima_of(g, theta, eps, exponent, KIND)
            store_tiles(maxima + tile + i // TILE + row, highest, i + row * TILE < length, FULL)
        again = (again >> 1) & 0x7FFFFFFF
        i += ROWS * TILE


@triton.jit
def tile_maxima_kernel(
    params, grads, owners, tiles, offsets, lengths, active, maxima, eps, exponent,
    wanted, low, widest, CHUNK: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, PARAM: tl.constexpr,
    GRAD: tl.constexpr, FULL: tl.constexpr, EXCLUDE: tl.constexpr, QUICK: tl.constexpr,
):  # fmt: skip
    """One warp streams one chunk, ROWS tiles per iteration; a lane has 8 neighbouring entries of a tile.

    QUICK: scores of `quick_d3`; tiles whose largest is outside the bounds, low and widest, are scored again.
    A chunk takes at most 32 iterations.
    """
    if tl.load(wanted) <= 0:
        return
    param, grad, tile, length, row, within, byte = chunk_of(
        params, grads, owners, tiles, offsets, lengths, CHUNK, ROWS, PARAM, GRAD, FULL
    )
    i = 0
    again = 0
    while i < length:
        reads = (i + row * TILE < length)[:, None]
        g, theta = load_tiles(
            grad, param, i + within, i + within < length, active + i // 8 + byte, reads, KIND, PARAM, GRAD,
            FULL, EXCLUDE,
        )  # fmt: skip
        if QUICK:
            highest = quick_maxima(g, theta, eps, widest, KIND)
            span = (HIGH_KEY - low).to(tl.uint32, bitcast=True)
            beyond = (highest - low).to(tl.uint32, bitcast=True) >= span
            unsure = (highest != 0) & beyond
            again |= tl.max(unsure.to(tl.int32), 0) << (i // (ROWS * TILE))
        else:
            highest = maxima_of(g, theta, eps, exponent, KIND)
        store_tiles(maxima + tile + i // TILE + row, highest, i + row * TILE < length, FULL)
        i += ROWS * TILE
    if again != 0:  # seldom, and behind the loop, which else would keep registers for it
        score_again(
            again, params, grads, owners, tiles, offsets, lengths, active, maxima, eps, exponent, CHUNK, ROWS,
            KIND, PARAM, GRAD, FULL, EXCLUDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n"])  # else a new size compiles anew
def clear_kernel(words, n, wanted, BLOCK: tl.constexpr):
    if tl.load(wanted) <= 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(words + at, tl.zeros((BLOCK,), tl.int32), mask=at < n)


@triton.jit(do_not_specialize=["stride", "n", "n_tensors"])  # else a new size compiles anew
def mark_active_kernel(
    words, offsets, stride, indices, first_tile, numels, n, n_tensors, wanted, BLOCK: tl.constexpr
):
    """Sets the bit of every entry of the runs; skips indices outside their tensor."""
    if tl.load(wanted) <= 0:
        return
    own, first = run_of(offsets, stride, n, BLOCK)
    if first >= tl.load(own + n_tensors):
        return
    at = first + tl.arange(0, BLOCK)
    owner = owner_of(own, n_tensors, at)
    held = owner < n_tensors
    index = tl.load(indices + at, mask=held, other=0)
    held = held & (index < tl.load(numels + owner, mask=held, other=0))
    slot = tl.load(first_tile + owner, mask=held, other=0) * TILE + index
    tl.atomic_or(words + slot // 32, (1 << (slot % 32)).to(tl.int32), mask=held, sem="relaxed")


def select_topk(params, grads, offsets, indices, k, capacity, eps, exp):
    """See `table.OPS`. A tensor whose strides are not row-major is read through a copy."""
    return _select(params, grads, offsets, indices, k, capacity, kind_of(exp), eps, exp)


def select_topk_by_score(scores, offsets, indices, k, capacity):
    """See `table.OPS`."""
    return _select([None] * len(scores), scores, offsets, indices, k, capacity, "given", 0.0, 0.0)


def _select(params, grads, offsets, indices, k, capacity, kind, eps, exp):
    launch.check(*params, *grads)
    found = winners(params, grads, offsets, indices, k, capacity, kind, eps, exp)
    if found is None:
        zeros = (torch.zeros(capacity, dtype=t, device=k.device) for t in (torch.int32, torch.float32))
        return offsets.new_zeros(offsets.shape[-1]), *zeros
    cut, slots, index, keys = found
    return torch.searchsorted(slots, cut.first_slot), index, keys.view(torch.float32)


def winners(params, grads, offsets, indices, k, capacity, kind, eps, exp):
    """The layout of the tensors, and the winners as `best_entries` returns them; None without any entry.

    kind: of `kind_of`, or "given": grads are scores.
    """
    device = offsets.device
    grads = [None if g is None else g.contiguous() for g in grads]
    reads_params = kind not in ("g", "given")
    pairs = list(zip(params, grads, strict=True))
    params = [p.contiguous() if reads_params and g is not None else None for p, g in pairs]
    cut = tables.layout(tuple(map(_span, params, grads)), device)
    if not capacity or not cut.tiles:
        return None
    active = _bitmap(cut, offsets, indices, tables.most_entries(grads, indices), k)
    reading = _reading(cut, params if reads_params else grads, grads, active, kind, eps, exp)
    tiles = None
    if capacity <= cut.tiles // MANY:
        tiles = _best_tiles(_tile_maxima(reading, k), k, capacity)
    return cut, *best_entries(reading, tiles, k, capacity)


def _span(param: Tensor | None, grad: Tensor | None) -> Span:
    if grad is None:
        return Span(0, 0, 0, True)
    read = [t for t in (param, grad) if t is not None]
    aligned = all(tables.address(t) % launch.ALIGNMENT_BYTES == 0 for t in read)
    return Span(grad.numel(), launch.CODES[read[0].dtype], launch.CODES[grad.dtype], aligned)


def _reading(cut: Layout, params, grads, active: Tensor, kind: str, eps: float, exp: float):
    device = active.device
    of_grads = tables.addresses(grads, device), tables.codes(grads, device)
    of_params = of_grads
    if params is not grads:
        of_params = tables.addresses(params, device), tables.codes(params, device)
    columns = of_params[0], of_grads[0], of_params[1], of_grads[1]
    bounds = quick_bounds(exp, eps) if kind in QUICK_KINDS else (0, 0.0)
    return Reading(cut, *columns, active, active.numel() > 0, kind, eps, exponent(exp, device), bounds)


def _bitmap(cut: Layout, offsets: Tensor, indices: Tensor, n: int, wanted: Tensor) -> Tensor:
    """uint8: one bit per slot, set for the active entries, at most n a run; of no size where n is 0."""
    device, block = offsets.device, 1024
    words = torch.empty(cut.tiles * TILE.value // 32 if n else 0, dtype=torch.int32, device=device)
    launch.run(
        clear_kernel, triton.cdiv(words.numel(), block), 4, device, words, words.numel(), wanted, block
    )
    n_runs, stride = runs_of(offsets)
    launch.run(
        mark_active_kernel, n_runs * triton.cdiv(n, block), 4, device, words, offsets, stride, indices,
        cut.first_tile, cut.numels, n, cut.numels.numel(), wanted, block,
    )  # fmt: skip
    return words.view(torch.uint8)


def _tile_maxima(reading: Reading, wanted: Tensor) -> Tensor:
    """int32 [tiles]: the largest key of each tile. One launch per kind of chunk."""
    cut = reading.cut
    maxima = torch.empty(cut.tiles, dtype=torch.int32, device=wanted.device)
    quick = launch.ON_NVIDIA and reading.kind in QUICK_KINDS
    for kind in cut.launches:
        chunks = [x[kind.begin : kind.end] for x in (cut.owner, cut.tile, cut.offset, cut.length)]
        launch.run(
            tile_maxima_kernel, kind.end - kind.begin, 1, maxima.device, reading.params, reading.grads,
            *chunks, reading.active, maxima, reading.eps, reading.exponent, wanted, *reading.bounds,
            cut.chunk, ROWS, reading.kind, kind.param_code, kind.grad_code, kind.full, reading.exclude, quick,
        )  # fmt: skip
    return maxima


def _best_tiles(maxima: Tensor, k: Tensor, capacity: int) -> Tensor:
    """int64 [capacity]: the tiles with the largest maxima, ascending; padded with a number above all tiles.

    A maximum has the bits of a score, so this is a selection from one tensor of maxima.
    """
    cut = tables.layout((Span(maxima.numel(), 0, 0, True),), maxima.device)
    none_active, scores = maxima[:0].view(torch.uint8), [maxima.view(torch.float32)]
    return best_entries(_reading(cut, scores, scores, none_active, "given", 0.0, 0.0), None, k, capacity)[0]

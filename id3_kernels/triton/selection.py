"""Exact top-k by tile maxima: one streaming pass over (θ, g), then a second look at k tiles.

The k largest scores lie in the k tiles with the largest maxima (ties to the lowest tile): any other tile
is beaten, entry for entry, by the maxima of those k, each of which stands at a lower position or higher
score. Both looks use the same IEEE arithmetic, so no margin is needed. Active entries are left out by an
N-bit map, zeroed and set anew in each call: 1/8 byte an entry, 3 % of a bfloat16 read of θ and g.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..collect import collect_by_selection_
from . import launch
from .launch import TILE, Layout, Span, load_any, load_wide
from .score import d3, exponent, key, kind_of, normal_key

ROWS = 2  # tiles in flight per warp: 4 would need more than 64 registers with IEEE division
MANY = 4  # k above 1/4 of the tiles: no first look, it would spare too little of the second
LOOK_ENTRIES = 1 << 20  # entries re-scored at a time, or k if that is more


@triton.jit
def tile_maxima_kernel(
    params, grads, owners, tiles, offsets, lengths, active, maxima, eps, exponent,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, PARAM: tl.constexpr,
    GRAD: tl.constexpr, FULL: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """One warp streams one chunk, ROWS tiles a step; a lane owns 8 neighbouring entries of a tile."""
    c = tl.program_id(0)
    owner = tl.load(owners + c)
    start = tl.multiple_of(tl.load(offsets + c), TILE)
    param = tl.load(params + owner) + start * (4 if PARAM == 0 else 2)
    grad = tl.load(grads + owner) + start * (4 if GRAD == 0 else 2)
    tile = tl.load(tiles + c)
    length = CHUNK if FULL else tl.load(lengths + c)
    row, lane, at = tl.arange(0, ROWS), tl.arange(0, TILE // 8), tl.arange(0, 8)
    here = row[:, None, None] * TILE + lane[None, :, None] * 8 + at[None, None, :]
    byte = tile * (TILE // 8) + row[:, None] * (TILE // 8) + lane[None, :]
    i = 0
    while i < length:
        inside = i + here < length
        g = load_wide(grad, i + here, inside, GRAD, FULL)
        if KIND != "given":
            g = tl.abs(g)
        if EXCLUDE:
            taken = tl.load(active + i // 8 + byte, mask=(i + row * TILE < length)[:, None], other=0)
            g = tl.where((taken.to(tl.int32)[:, :, None] >> at[None, None, :]) & 1 != 0, 0.0, g)
        theta = g
        if (KIND != "g") & (KIND != "given"):
            theta = load_wide(param, i + here, inside, PARAM, FULL)
        best = key(d3(g, theta, eps, exponent, KIND), g)
        highest = normal_key(tl.max(tl.max(best, 2), 1))
        tl.store(maxima + tile + i // TILE + row, highest, mask=i + row * TILE < length)
        i += ROWS * TILE


@triton.jit
def tile_keys_kernel(
    params, grads, param_codes, grad_codes, first_tile, numels, owners, listed, active, keys, eps, exponent,
    KIND: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """The keys of all entries of one listed tile; a tensor of any dtype."""
    p = tl.program_id(0)
    tile, owner = tl.load(listed + p), tl.load(owners + p)
    at = tl.arange(0, TILE)
    entry = (tile - tl.load(first_tile + owner)) * TILE + at
    inside = entry < tl.load(numels + owner)
    g = load_any(tl.load(grads + owner), entry, inside, tl.load(grad_codes + owner))
    if KIND != "given":
        g = tl.abs(g)
    if EXCLUDE:
        taken = tl.load(active + tile * (TILE // 8) + at // 8).to(tl.int32)
        g = tl.where((taken >> (at % 8)) & 1 != 0, 0.0, g)
    theta = g
    if (KIND != "g") & (KIND != "given"):
        theta = load_any(tl.load(params + owner), entry, inside, tl.load(param_codes + owner))
    tl.store(keys + p.to(tl.int64) * TILE + at, normal_key(key(d3(g, theta, eps, exponent, KIND), g)))


@triton.jit
def mark_active_kernel(words, owners, indices, first_tile, numels, n, n_tensors, BLOCK: tl.constexpr):
    """Sets the bit of every entry; owner n_tensors and an index that the tensor lacks belong to nobody."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.load(owners + at, mask=at < n, other=n_tensors)
    index = tl.load(indices + at, mask=at < n, other=0)
    held = owner < n_tensors
    held = held & (index < tl.load(numels + owner, mask=held, other=0))
    slot = tl.load(first_tile + owner, mask=held, other=0) * TILE + index
    tl.atomic_or(words + slot // 32, (1 << (slot % 32)).to(tl.int32), mask=held, sem="relaxed")


class _Reading(NamedTuple):
    """What both looks read: the tensors as tables, the formula, and the entries to leave out."""

    cut: Layout
    params: Tensor
    grads: Tensor
    param_codes: Tensor
    grad_codes: Tensor
    active: Tensor
    exclude: bool
    kind: str
    eps: float
    exponent: Tensor


def select_topk(params, grads, offsets, indices, k, eps, exp):
    """See the op table. Reads a tensor of other than row-major strides through a copy of it."""
    return _select(params, grads, offsets, indices, k, kind_of(exp), eps, exp)


def select_topk_by_score(scores, offsets, indices, k):
    """See the op table."""
    return _select([None] * len(scores), scores, offsets, indices, k, "given", 0.0, 0.0)


def collect_(param, *rest):
    """See the op table."""
    launch.check(param)
    collect_by_selection_(select_topk, select_topk_by_score, param, *rest)


def _select(params, grads, offsets, indices, k, kind, eps, exp):
    launch.check(*params, *grads)
    device = offsets.device
    grads = [None if g is None else g.contiguous() for g in grads]
    reads_params = kind not in ("g", "given")
    pairs = list(zip(params, grads, strict=True))
    params = [p.contiguous() if reads_params and g is not None else None for p, g in pairs]
    spans = tuple(_span(p, g) for p, g in zip(params, grads, strict=True))
    cut = launch.layout(spans, device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    keys = slots.int()
    if k and cut.tiles:
        tables = [table(ts, device) for table in (launch.addresses, launch.codes) for ts in (params, grads)]
        active = _bitmap(cut, offsets, indices)
        reading = _Reading(cut, *tables, active, indices.numel() > 0, kind, eps, exponent(exp, device))
        slots, keys = _best_entries(reading, k)
    return _as_entries(cut, slots, keys, k)


def _span(param: Tensor | None, grad: Tensor | None) -> Span:
    if grad is None:
        return Span(0, 0, 0, True)
    read = [t for t in (param, grad) if t is not None]
    aligned = all(t.data_ptr() % launch.ALIGNMENT_BYTES == 0 for t in read)
    return Span(grad.numel(), launch.CODES[read[0].dtype], launch.CODES[grad.dtype], aligned)


def _bitmap(cut: Layout, offsets: Tensor, indices: Tensor) -> Tensor:
    """uint8: one bit per slot, set for the active entries; of no size where there are none."""
    n, n_tensors = indices.numel(), offsets.numel() - 1
    words = torch.zeros(cut.tiles * TILE.value // 32 if n else 0, dtype=torch.int32, device=offsets.device)
    owners = launch.owners(offsets, n)
    block = 1024
    launch.run(
        mark_active_kernel, triton.cdiv(n, block), 4, offsets.device,
        words, owners, indices, cut.first_tile, cut.numels, n, n_tensors, block,
    )  # fmt: skip
    return words.view(torch.uint8)


def _best_entries(reading: _Reading, k: int) -> tuple[Tensor, Tensor]:
    """Ascending slots (int64) and keys (int32) of the k best entries; a key of 0 is no entry."""
    cut, device = reading.cut, reading.active.device
    few = k <= cut.tiles // MANY
    tiles = _best(_tile_maxima(reading), k) if few else torch.arange(cut.tiles, device=device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    keys = slots.int()
    for part in tiles.split(max(LOOK_ENTRIES, k) // TILE.value):
        part_keys = _tile_keys(reading, part)
        here = _best(part_keys, k)
        slots = torch.cat([slots, part[here // TILE.value] * TILE.value + here % TILE.value])
        keys = torch.cat([keys, part_keys[here]])
        kept = _best(keys, k)
        slots, keys = slots[kept], keys[kept]
    return slots, keys


def _tile_maxima(reading: _Reading) -> Tensor:
    """int32 [tiles]: the largest key of each tile. One launch per dtype pair, and one for its odd chunks."""
    cut = reading.cut
    maxima = torch.empty(cut.tiles, dtype=torch.int32, device=reading.active.device)
    for kind in cut.launches:
        chunks = [x[kind.begin : kind.end] for x in (cut.owner, cut.tile, cut.offset, cut.length)]
        launch.run(
            tile_maxima_kernel, kind.end - kind.begin, 1, maxima.device,
            reading.params, reading.grads, *chunks, reading.active, maxima, reading.eps, reading.exponent,
            cut.chunk, ROWS, reading.kind, kind.param_code, kind.grad_code, kind.full, reading.exclude,
        )  # fmt: skip
    return maxima


def _tile_keys(reading: _Reading, tiles: Tensor) -> Tensor:
    """int32 [256 · tiles]: the keys of all entries of the listed tiles."""
    cut, n = reading.cut, tiles.numel()
    keys = torch.empty(n * TILE.value, dtype=torch.int32, device=tiles.device)
    owners = torch.searchsorted(cut.first_tile[1:], tiles, right=True, out_int32=True)
    launch.run(
        tile_keys_kernel, n, 4, tiles.device,
        reading.params, reading.grads, reading.param_codes, reading.grad_codes, cut.first_tile, cut.numels,
        owners, tiles, reading.active, keys, reading.eps, reading.exponent, reading.kind, reading.exclude,
    )  # fmt: skip
    return keys


def _best(keys: Tensor, k: int) -> Tensor:
    """Ascending positions of the k largest keys (all, if fewer), ties to the lowest. Never synchronises."""
    k = min(k, keys.numel())
    threshold = keys.topk(k, sorted=False).values.min()
    above, equal = keys > threshold, keys == threshold
    wanted = above | (equal & (equal.cumsum(0) <= k - above.sum()))
    return torch.nonzero_static(wanted, size=k).flatten()


def _as_entries(cut: Layout, slots: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """offsets, indices [k] and scores [k] of the slots with a key above 0, which come first."""
    n_tensors = cut.numels.numel()
    order = (keys == 0).sort(stable=True).indices
    slots, keys = slots[order], keys[order]
    owner = torch.searchsorted(cut.first_tile[1:], slots // TILE.value, right=True)
    index = slots - cut.first_tile[owner] * TILE.value
    owner = torch.where(keys == 0, n_tensors, owner)
    offsets = torch.searchsorted(owner, torch.arange(n_tensors + 1, device=slots.device))
    indices, scores = slots.new_zeros(k, dtype=torch.int32), keys.new_zeros(k).view(torch.float32)
    indices[: index.numel()] = index
    scores[: keys.numel()] = keys.view(torch.float32)
    return offsets, indices, scores

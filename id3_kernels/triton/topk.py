"""The exact best k entries of a list of tiles, by a radix selection that computes the scores in each pass.

Four passes settle the k-th largest key, eight bits at a time; two more count and write the winners, in entry
order. No pass stores anything per entry, and where k on the device is 0, no pass reads an entry.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import TILE, load_any
from .score import d3, key, normal_key
from .tables import Layout

BINS = tl.constexpr(256)
SHIFTS = (24, 16, 8, 0)
BLOCK = 1024
PROGRAMS = 2048  # each adds at most BINS counts to one histogram


class Reading(NamedTuple):
    """What a pass reads: the tensors as tables, the formula, and the entries to leave out.

    active: uint8, one bit per slot, read only if `exclude`. bounds: of the quick scores.
    """

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
    bounds: tuple[int, float]


@triton.jit
def load_keys(
    params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
    tiles, owners, n, begin, KIND: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(slot, index, key) of entries from `begin` on, of the n in the listed tiles; key 0: not selectable."""
    row, at = begin // TILE + tl.arange(0, BLOCK // TILE), tl.arange(0, TILE)[None, :]
    tile = tl.load(tiles + row, mask=row < n // TILE, other=0)
    owner = tl.load(owners + row, mask=row < n // TILE, other=n_tensors)
    known = owner < n_tensors
    first = tile - tl.load(first_tile + owner, mask=known, other=0)
    index = first[:, None] * TILE + at
    inside = index < tl.load(numels + owner, mask=known, other=0)[:, None]
    grad, code = tl.load(grads + owner, mask=known, other=0), tl.load(grad_codes + owner, mask=known, other=0)
    g = load_any(grad[:, None], index, inside, code[:, None])
    if KIND != "given":
        g = tl.abs(g)
    slot = tile[:, None] * TILE + at
    if EXCLUDE:
        taken = tl.load(active + slot // 8, mask=inside, other=0).to(tl.int32)
        g = tl.where((taken >> (at % 8)) & 1 != 0, 0.0, g)
    theta = g
    if (KIND != "g") & (KIND != "given"):
        param = tl.load(params + owner, mask=known, other=0)
        code = tl.load(param_codes + owner, mask=known, other=0)
        theta = load_any(param[:, None], index, inside, code[:, None])
    keys = tl.where(inside, normal_key(key(d3(g, theta, eps, exponent, KIND), g)), 0)
    return tl.reshape(slot, (BLOCK,)), tl.reshape(index, (BLOCK,)), tl.reshape(keys, (BLOCK,))


@triton.jit
def count_digits_kernel(
    params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
    tiles, owners, n, run, state, histogram,
    KIND: tl.constexpr, EXCLUDE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts each value of a digit among the keys whose higher digits equal those of state[0]."""
    if tl.load(state + 1) <= 0:
        return
    prefix = tl.load(state).to(tl.int32)
    begin = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(begin + run, n)
    counts = tl.zeros((BINS,), tl.int32)
    while begin < end:
        _, _, keys = load_keys(
            params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
            tiles, owners, n, begin, KIND, EXCLUDE, BLOCK,
        )  # fmt: skip
        digits = (keys ^ prefix) >> SHIFT  # larger than any digit where a higher digit differs
        counts += tl.histogram(digits & (BINS - 1), BINS, mask=(keys > 0) & (digits < BINS))
        begin += BLOCK
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def settle_digit_kernel(state, histogram, SHIFT: tl.constexpr):
    """state: the known digits of the threshold, and how many of the keys with these digits are wanted."""
    wanted = tl.load(state + 1)
    if wanted <= 0:
        return
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bins)
    at_least = tl.sum(counts) - tl.cumsum(counts) + counts
    digit = tl.max(tl.where(at_least >= wanted, bins, 0))
    tl.store(state, tl.load(state) + (digit.to(tl.int64) << SHIFT))
    tl.store(state + 1, wanted - tl.sum(tl.where(bins > digit, counts, 0)))


@triton.jit
def count_winners_kernel(
    params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
    tiles, owners, n, run, state, counts,
    KIND: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per program: the number of keys above the threshold, and of keys equal to it."""
    if tl.load(state + 1) <= 0:
        return
    threshold = tl.load(state).to(tl.int32)
    begin = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(begin + run, n)
    n_above, n_equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    while begin < end:
        _, _, keys = load_keys(
            params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
            tiles, owners, n, begin, KIND, EXCLUDE, BLOCK,
        )  # fmt: skip
        n_above += tl.sum((keys > threshold).to(tl.int32))
        n_equal += tl.sum(((keys == threshold) & (keys > 0)).to(tl.int32))
        begin += BLOCK
    tl.store(counts + tl.program_id(0), n_above)
    tl.store(counts + tl.num_programs(0) + tl.program_id(0), n_equal)


@triton.jit
def write_winners_kernel(
    params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
    tiles, owners, n, run, state, before, slots, indices, best,
    KIND: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """before: sums of `count_winners_kernel` over all lower programs. Of equal keys the first ones win."""
    wanted = tl.load(state + 1)
    if wanted <= 0:
        return
    threshold = tl.load(state).to(tl.int32)
    begin = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(begin + run, n)
    n_above = tl.load(before + tl.program_id(0))
    n_equal = tl.load(before + tl.num_programs(0) + tl.program_id(0))
    while begin < end:
        slot, index, keys = load_keys(
            params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
            tiles, owners, n, begin, KIND, EXCLUDE, BLOCK,
        )  # fmt: skip
        above = (keys > threshold).to(tl.int32)
        equal = ((keys == threshold) & (keys > 0)).to(tl.int32)
        rank = n_equal + tl.cumsum(equal) - equal
        wins = (above != 0) | ((equal != 0) & (rank < wanted))
        place = n_above + tl.cumsum(above) - above + tl.minimum(rank, wanted)
        tl.store(slots + place, slot, mask=wins)
        tl.store(indices + place, index.to(tl.int32), mask=wins)
        tl.store(best + place, keys, mask=wins)
        n_above += tl.sum(above)
        n_equal += tl.sum(equal)
        begin += BLOCK


def best_entries(reading: Reading, tiles: Tensor, wanted: Tensor, capacity: int):
    """(slots int64, indices int32, keys int32) [capacity]: the best `wanted` (0 … capacity) in entry order.

    tiles: int64, ascending; a number above all tiles is padding. The padding of the results: the number of
    all slots, 0, 0.
    """
    cut, device = reading.cut, tiles.device
    n = tiles.numel() * TILE.value
    run = triton.cdiv(triton.cdiv(n, BLOCK), PROGRAMS) * BLOCK
    programs = triton.cdiv(n, run)
    owners = torch.searchsorted(cut.first_tile[1:], tiles, right=True, out_int32=True)
    source = (
        reading.params, reading.grads, reading.param_codes, reading.grad_codes, cut.first_tile, cut.numels,
        cut.numels.numel(), reading.active, reading.eps, reading.exponent, tiles, owners, n, run,
    )  # fmt: skip
    formula = reading.kind, reading.exclude
    state = torch.cat([torch.zeros_like(wanted), wanted])
    for shift in SHIFTS:
        histogram = torch.zeros(BINS.value, dtype=torch.int64, device=device)
        launch.run(
            count_digits_kernel, programs, 4, device, *source, state, histogram, *formula, shift, BLOCK
        )
        launch.run(settle_digit_kernel, 1, 1, device, state, histogram, shift)
    counts = torch.zeros(2, programs, dtype=torch.int64, device=device)
    launch.run(count_winners_kernel, programs, 4, device, *source, state, counts, *formula, BLOCK)
    before = counts.cumsum(1) - counts
    slots = torch.full((capacity,), cut.tiles * TILE.value, dtype=torch.int64, device=device)
    indices, keys = (torch.zeros(capacity, dtype=torch.int32, device=device) for _ in range(2))
    launch.run(
        write_winners_kernel, programs, 4, device, *source, state, before, slots, indices, keys, *formula,
        BLOCK,
    )  # fmt: skip
    return slots, indices, keys

"""The exact best k entries of a list of tiles, by a radix selection that computes the scores in each pass.

Four passes settle the k-th largest key, eight bits at a time; two more count and write the winners, in entry
order. No pass stores anything per entry, and where k on the device is 0, no pass reads an entry.

Each program reads the histogram of the pass before and settles its digit anew, so a digit takes one launch,
and nothing depends on an order of programs within a launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import TILE, load_any
from .places import owner_of
from .score import d3, key, normal_key
from .tables import Layout

BINS = tl.constexpr(256)
ROUNDS = tl.constexpr(4)  # of eight bits
BLOCK = 1024
PROGRAMS = 2048  # at most; each adds at most BINS counts to one histogram
LANES = tl.constexpr(PROGRAMS)  # that read the counts of all programs


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
    tiles, n, begin, KIND: tl.constexpr, EXCLUDE: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(slot, index, key) of entries from `begin` on, of n; key 0: not selectable.

    LISTED: the entries of the listed tiles, else of all.
    """
    row, at = begin // TILE + tl.arange(0, BLOCK // TILE), tl.arange(0, TILE)[None, :]
    tile = row
    if LISTED:
        tile = tl.load(tiles + row, mask=row < n // TILE, other=0)
    owner = tl.where(row < n // TILE, owner_of(first_tile, n_tensors, tile), n_tensors)
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
def known_digits(k, capacity, state, histogram, ROUND: tl.constexpr):
    """(the threshold's digits known before round ROUND, how many keys with these digits are wanted).

    Row r of `state` has both before round r; the first program writes that of ROUND.
    """
    threshold = tl.zeros((), tl.int32)
    wanted = tl.maximum(tl.minimum(tl.load(k), capacity), 0)
    if ROUND > 1:
        threshold = tl.load(state + 2 * (ROUND - 1)).to(tl.int32)
        wanted = tl.load(state + 2 * (ROUND - 1) + 1)
    if ROUND > 0:
        bins = tl.arange(0, BINS)
        counts = tl.load(histogram + (ROUND - 1) * BINS + bins)
        at_least = tl.cumsum(counts, reverse=True)
        digit = tl.max(tl.where(at_least >= wanted, bins, 0))
        threshold += digit << (8 * (ROUNDS - ROUND))
        wanted -= tl.sum(tl.where(bins > digit, counts, 0))
        if tl.program_id(0) == 0:
            tl.store(state + 2 * ROUND, threshold.to(tl.int64))
            tl.store(state + 2 * ROUND + 1, wanted)
    return threshold, wanted


@triton.jit(do_not_specialize=["n_tensors", "n", "run", "capacity"])  # else a new size compiles anew
def count_digits_kernel(
    params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
    tiles, n, run, k, capacity, state, histogram,
    KIND: tl.constexpr, EXCLUDE: tl.constexpr, LISTED: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts each value of digit ROUND among the keys that have the known digits."""
    if tl.load(k) <= 0:
        return
    threshold, _wanted = known_digits(k, capacity, state, histogram, ROUND)
    begin = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(begin + run, n)
    counts = tl.zeros((BINS,), tl.int32)
    while begin < end:
        _, _, keys = load_keys(
            params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
            tiles, n, begin, KIND, EXCLUDE, LISTED, BLOCK,
        )  # fmt: skip
        # larger than any digit where a higher digit differs
        digits = (keys ^ threshold) >> (8 * (ROUNDS - 1 - ROUND))
        counts += tl.histogram(digits & (BINS - 1), BINS, mask=(keys > 0) & (digits < BINS))
        begin += BLOCK
    bins = tl.arange(0, BINS)
    own = histogram + ROUND * BINS + bins
    tl.atomic_add(own, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_tensors", "n", "run", "capacity"])  # else a new size compiles anew
def count_winners_kernel(
    params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
    tiles, n, run, k, capacity, state, histogram, counts,
    KIND: tl.constexpr, EXCLUDE: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts [2, programs]: each program's keys above the threshold, and its keys equal to it."""
    if tl.load(k) <= 0:
        return
    threshold, _wanted = known_digits(k, capacity, state, histogram, ROUNDS)
    begin = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(begin + run, n)
    n_above, n_equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    while begin < end:
        _, _, keys = load_keys(
            params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
            tiles, n, begin, KIND, EXCLUDE, LISTED, BLOCK,
        )  # fmt: skip
        n_above += tl.sum((keys > threshold).to(tl.int32))
        n_equal += tl.sum((keys == tl.maximum(threshold, 1)).to(tl.int32))  # 1 is no key
        begin += BLOCK
    tl.store(counts + tl.program_id(0), n_above)
    tl.store(counts + tl.num_programs(0) + tl.program_id(0), n_equal)


@triton.jit
def before_and_in_all(counts, known):
    """(the sum over the lower programs, the sum over all programs); zeros unless `known`."""
    program = tl.arange(0, LANES)
    count = tl.load(counts + program, mask=known & (program < tl.num_programs(0)), other=0).to(tl.int64)
    return tl.sum(tl.where(program < tl.program_id(0), count, 0)), tl.sum(count)


@triton.jit(
    do_not_specialize=["n_tensors", "n", "run", "capacity", "padding"]
)  # else a new size compiles anew
def write_winners_kernel(
    params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
    tiles, n, run, k, capacity, state, counts, slots, indices, best, padding,
    KIND: tl.constexpr, EXCLUDE: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of equal keys the first ones win. Behind the last winner: `padding` as the slot, and zeros."""
    any_wanted = tl.load(k) > 0
    threshold, wanted = tl.load(state + 2 * ROUNDS).to(tl.int32), tl.load(state + 2 * ROUNDS + 1)
    n_above, all_above = before_and_in_all(counts, any_wanted)
    n_equal, all_equal = before_and_in_all(counts + tl.num_programs(0), any_wanted)
    place = all_above + tl.minimum(all_equal, wanted) + tl.program_id(0).to(tl.int64) * BLOCK
    place += tl.arange(0, BLOCK)
    while tl.min(place) < capacity:
        tl.store(slots + place, padding + tl.zeros((BLOCK,), tl.int64), mask=place < capacity)
        tl.store(indices + place, tl.zeros((BLOCK,), tl.int32), mask=place < capacity)
        tl.store(best + place, tl.zeros((BLOCK,), tl.int32), mask=place < capacity)
        place += tl.num_programs(0).to(tl.int64) * BLOCK
    begin = tl.program_id(0).to(tl.int64) * run
    end = tl.where(any_wanted, tl.minimum(begin + run, n), 0)
    while begin < end:
        slot, index, keys = load_keys(
            params, grads, param_codes, grad_codes, first_tile, numels, n_tensors, active, eps, exponent,
            tiles, n, begin, KIND, EXCLUDE, LISTED, BLOCK,
        )  # fmt: skip
        above = (keys > threshold).to(tl.int32)
        equal = (keys == tl.maximum(threshold, 1)).to(tl.int32)
        rank = n_equal + tl.cumsum(equal) - equal
        wins = (above != 0) | ((equal != 0) & (rank < wanted))
        place = n_above + tl.cumsum(above) - above + tl.minimum(rank, wanted)
        tl.store(slots + place, slot, mask=wins)
        tl.store(indices + place, index.to(tl.int32), mask=wins)
        tl.store(best + place, keys, mask=wins)
        n_above += tl.sum(above)
        n_equal += tl.sum(equal)
        begin += BLOCK


def best_entries(reading: Reading, tiles: Tensor | None, k: Tensor, capacity: int):
    """(slots int64, indices int32, keys int32) [capacity]: the best k (0 … capacity) in entry order.

    tiles: int64, ascending, a number above all tiles being padding; None: all tiles. The padding of the
    results: the number of all slots, 0, 0. In seven launches.
    """
    cut, device = reading.cut, k.device
    n = (cut.tiles if tiles is None else tiles.numel()) * TILE.value
    run = triton.cdiv(triton.cdiv(n, BLOCK), PROGRAMS) * BLOCK
    programs = triton.cdiv(n, run)
    source = (
        reading.params, reading.grads, reading.param_codes, reading.grad_codes, cut.first_tile, cut.numels,
        cut.numels.numel(), reading.active, reading.eps, reading.exponent,
        cut.first_tile if tiles is None else tiles, n, run, k, capacity,
    )  # fmt: skip
    form = reading.kind, reading.exclude, tiles is not None
    bins = BINS.value * ROUNDS.value
    zeros = torch.zeros(bins + 2 * (ROUNDS.value + 1), dtype=torch.int64, device=device)
    histogram, state = zeros[:bins], zeros[bins:]
    for digit in range(ROUNDS.value):
        launch.run(count_digits_kernel, programs, 4, device, *source, state, histogram, *form, digit, BLOCK)
    counts = torch.empty(2, programs, dtype=torch.int32, device=device)
    launch.run(count_winners_kernel, programs, 4, device, *source, state, histogram, counts, *form, BLOCK)
    slots = torch.empty(capacity, dtype=torch.int64, device=device)
    indices, keys = (torch.empty(capacity, dtype=torch.int32, device=device) for _ in range(2))
    launch.run(
        write_winners_kernel, programs, 4, device, *source, state, counts, slots, indices, keys,
        cut.tiles * TILE.value, *form, BLOCK,
    )  # fmt: skip
    return slots, indices, keys

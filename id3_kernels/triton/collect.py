"""Released gradients: the values at active entries, and the best candidates so far, tensor by tensor.

A tensor's best entries come from a selection. With the candidates that are held they are sorted by place and
then by score, both times stably, so that ties go to the lowest place; what is left are the first ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch, tables
from .launch import load_wide
from .places import run_of, runs_of
from .score import kind_of
from .selection import winners

BLOCK = 256


@triton.jit(do_not_specialize=["stride", "n"])  # else a new size compiles anew
def take_kernel(
    grad, offsets, stride, indices, values, n, CODE: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """The values at the entries of all runs of one tensor."""
    own, first = run_of(offsets, stride, n, BLOCK)
    at = first + tl.arange(0, BLOCK)
    inside = at < tl.load(own + 1)
    g = load_wide(tl.load(grad), tl.load(indices + at, mask=inside, other=0), inside, CODE, False)
    if ADD:
        g = tl.load(values + at, mask=inside, other=0.0) + g
    tl.store(values + at, g, mask=inside)


@triton.jit(do_not_specialize=["first", "n_held", "n"])  # else a new place or size compiles anew
def places_kernel(best_place, index, keys, places, first: tl.int64, n_held, n, BLOCK: tl.constexpr):
    """places [n]: of the n_held candidates, then of the entries found, which begin at `first`; -1: none."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_found = (i >= n_held) & (i < n)
    held = tl.load(best_place + i, mask=i < n_held, other=-1)
    key = tl.load(keys + i - n_held, mask=is_found, other=0)
    found = tl.load(index + i - n_held, mask=is_found, other=0).to(tl.int64) + first
    tl.store(places + i, tl.where(is_found, tl.where(key > 0, found, -1), held), mask=i < n)


@triton.jit
def score_at(order, best_score, keys, n_held, i, inside):
    """float32: the score of the candidate or entry that is the i-th by place."""
    source = tl.load(order + i, mask=inside, other=0)
    held = tl.load(best_score + source, mask=inside & (source < n_held), other=0.0)
    found = tl.load(keys + source - n_held, mask=inside & (source >= n_held), other=0)
    return tl.where(source < n_held, held, found.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["n_held", "n"])  # else a new size compiles anew
def merge_kernel(
    grad, best_score, best_grad, index, keys, places, order, score, place, value, n_held, n,
    CODE: tl.constexpr, MAY_HOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(score, place, value) [n] in the order of `places`.

    MAY_HOLD: of two of one place the one with the larger score stays, of equal scores the held one, and
    0, -1, 0 replaces the other.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    mine = tl.load(places + i, mask=inside, other=-1)
    s = score_at(order, best_score, keys, n_held, i, inside)
    source = tl.load(order + i, mask=inside, other=0)
    is_found = inside & (source >= n_held) & (mine >= 0)
    at = tl.load(index + source - n_held, mask=is_found, other=0)
    v = tl.load(best_grad + source, mask=inside & (source < n_held), other=0.0)
    v = tl.where(is_found, load_wide(tl.load(grad), at, is_found, CODE, False), v)
    if MAY_HOLD:
        after = tl.load(places + i + 1, mask=i + 1 < n, other=-1)
        before = tl.load(places + i - 1, mask=inside & (i > 0), other=-1)
        newer = score_at(order, best_score, keys, n_held, i + 1, i + 1 < n)
        older = score_at(order, best_score, keys, n_held, i - 1, inside & (i > 0))
        lost = ((after == mine) & (newer > s)) | ((before == mine) & (s <= older))
        s, v = tl.where(lost, 0.0, s), tl.where(lost, 0.0, v)
        mine = tl.where(lost, -1, mine)
    tl.store(score + i, s, mask=inside)
    tl.store(place + i, mine, mask=inside)
    tl.store(value + i, v, mask=inside)


@triton.jit(do_not_specialize=["n"])  # else a new size compiles anew
def keep_kernel(score, order, place, value, best_score, best_place, best_grad, n, BLOCK: tl.constexpr):
    """The first n. score: sorted; order: of the places and values by the scores."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(order + i, mask=i < n, other=0)
    tl.store(best_score + i, tl.load(score + i, mask=i < n, other=0.0), mask=i < n)
    tl.store(best_place + i, tl.load(place + source, mask=i < n, other=0), mask=i < n)
    tl.store(best_grad + i, tl.load(value + source, mask=i < n, other=0.0), mask=i < n)


def collect_(
    param, grad, score, offsets, indices, values, add, place, best_score, best_place, best_grad, state, k,
    may_hold, eps, exp,
):  # fmt: skip
    """See `table.OPS`. Every slot holds a candidate, best first. A tensor whose strides are not row-major is
    read through a copy."""
    launch.check(param, grad, score, values)
    grad, device = grad.contiguous(), grad.device
    n, (n_runs, stride) = tables.most_entries([grad], indices), runs_of(offsets)
    address, code = tables.addresses([grad], device), launch.CODES[grad.dtype]
    launch.run(
        take_kernel, n_runs * triton.cdiv(n, BLOCK), 4, device, address, offsets, stride, indices, values, n,
        code, add, BLOCK,
    )  # fmt: skip
    capacity = min(best_score.numel(), grad.numel())
    if not capacity:
        return
    kind, read = (kind_of(exp), grad) if score is None else ("given", score)
    *_, index, keys = winners([param], [read], offsets, indices, k, capacity, kind, eps, exp)
    _keep_best((best_score, best_place, best_grad), index, keys, place, address, code, may_hold)


def _keep_best(best, index, keys, first: int, grad, code: int, may_hold: bool) -> None:
    """Merges the entries of one tensor (index, key) into the candidates, which become the best of both."""
    best_score, best_place, best_grad = best
    n_held, device = best_score.numel(), keys.device
    n = n_held + keys.numel()
    programs = triton.cdiv(n, BLOCK)
    places = torch.empty(n, dtype=torch.int64, device=device)
    launch.run(places_kernel, programs, 4, device, best_place, index, keys, places, first, n_held, n, BLOCK)
    places, order = places.sort(stable=True)  # of equal places the held one comes first
    place, (score, value) = torch.empty_like(places), best_score.new_empty(2, n)
    launch.run(
        merge_kernel, programs, 4, device, grad, best_score, best_grad, index, keys, places, order, score,
        place, value, n_held, n, code, may_hold, BLOCK,
    )  # fmt: skip
    score, order = score.sort(descending=True, stable=True)
    launch.run(
        keep_kernel, triton.cdiv(n_held, BLOCK), 4, device, score, order, place, value, *best, n_held, BLOCK
    )

"""Candidates: the best entries of the tensors of a backward pass, one tensor after the other."""

from __future__ import annotations

import torch

from ..entries import runs
from .entries import read
from .score import d3_score, order_key
from .selection import best_keys, wanted_count


def collect_(
    param, grad, score, offsets, indices, values, add, place, best_score, best_place, best_grad, state, k,
    may_hold, eps, exp,
):  # fmt: skip
    rows = [slice(*run.tolist()) for run in runs(offsets)]
    for row in rows:
        gradient = read(grad, indices[row]).to(values.dtype)
        values[row].add_(gradient) if add else values[row].copy_(gradient)
    k = wanted_count(k, best_score.numel())
    if k == 0:
        return
    key = order_key(d3_score(param, grad, eps, exp) if score is None else score).reshape(-1)
    for row in rows:
        key[indices[row].to(torch.int64)] = 0
    index = best_keys(key, k)
    best = best_score, best_place, best_grad
    keep_best_(grad, place, index, key[index].view(values.dtype), *best, may_hold)


def keep_best_(grad, first, index, score, best_score, best_place, best_grad, may_hold):
    """Merges entries of one tensor (index int64, score; a score of 0 is no entry) into the candidates."""
    k, found = best_score.numel(), score > 0
    place = torch.cat([best_place, torch.where(found, first + index, -1)])
    held = read(grad, torch.where(found, index, 0)).to(best_grad.dtype)
    held = torch.cat([best_grad, torch.where(found, held, 0)])
    score = torch.cat([best_score, score])
    place, order = place.sort(stable=True)  # of equal places the older comes first
    score, held = score[order], held[order]
    if may_hold:
        same = place[1:] == place[:-1]
        newer_wins = score[1:] > score[:-1]
        lost = torch.zeros_like(place, dtype=torch.bool)
        lost[:-1] = same & newer_wins
        lost[1:] |= same & ~newer_wins
        place, score, held = (
            torch.where(lost, empty, x) for empty, x in ((-1, place), (0, score), (0, held))
        )
    order = score.sort(descending=True, stable=True).indices[:k]
    for best, merged in ((best_score, score), (best_place, place), (best_grad, held)):
        best.copy_(merged[order])


def best_by_selection_(
    select_topk, select_topk_by_score, param, grad, score, offsets, indices, first,
    best_score, best_place, best_grad, k, capacity, may_hold, eps, exp,
):  # fmt: skip
    """The part of `collect_` about candidates, by the selection of a backend; it sorts them, best first.

    capacity: an int, at least k and at most the number of slots for candidates. The host reads nothing from
    the device. A tensor whose strides are not row-major is copied.
    """
    capacity = min(capacity, grad.numel())
    if capacity == 0:
        return
    entries, grad = (offsets, indices, k, capacity), grad.contiguous()
    if score is None:
        _, index, best = select_topk([param], [grad], *entries, eps, exp)
    else:
        _, index, best = select_topk_by_score([score], *entries)
    keep_best_(grad, first, index.to(torch.int64), best, best_score, best_place, best_grad, may_hold)

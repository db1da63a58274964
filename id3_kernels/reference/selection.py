"""The best entries of a list of tensors, tensor by tensor: a temporary is as large as one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..entries import Entries, runs
from .entries import padded
from .score import d3_score, order_key, wide_dtype


def select_topk(params, grads, offsets, indices, k, capacity, eps, exp):
    def score(j):
        return None if grads[j] is None else d3_score(params[j], grads[j], eps, exp)

    dtype = wide_dtype(params[0].dtype) if params else torch.float32
    return _select(score, len(params), offsets, indices, k, capacity, dtype)


def select_topk_by_score(scores, offsets, indices, k, capacity):
    dtype = next((s.dtype for s in scores if s is not None), torch.float32)
    return _select(scores.__getitem__, len(scores), offsets, indices, k, capacity, dtype)


def _select(score_of, n_tensors: int, offsets, indices, k: Tensor, capacity: int, dtype: torch.dtype):
    device, k = offsets.device, wanted_count(k, capacity)
    active = [Entries(run, indices).lists() for run in runs(offsets)]
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    keys = torch.empty(0, dtype=integer, device=device)  # of the best k so far, in entry order
    index = torch.empty(0, dtype=torch.int64, device=device)
    owner = torch.empty(0, dtype=torch.int64, device=device)
    for j in range(n_tensors if k else 0):
        score = score_of(j)
        if score is None or score.numel() == 0:
            continue
        key = order_key(score).reshape(-1)
        for run in active:
            key[run[j].to(torch.int64)] = 0
        own = best_keys(key, k)
        keys, index = torch.cat([keys, key[own]]), torch.cat([index, own])
        owner = torch.cat([owner, torch.full_like(own, j)])
        kept = best_keys(keys, k)
        keys, index, owner = keys[kept], index[kept], owner[kept]
    edges = torch.arange(n_tensors + 1, device=device)
    winners = [padded(x, capacity) for x in (index.to(torch.int32), keys.view(dtype))]
    return torch.searchsorted(owner, edges), *winners


def wanted_count(k: Tensor, capacity: int) -> int:
    """k as an int, within 0 … capacity."""
    return min(max(int(k), 0), capacity)


def best_keys(keys: Tensor, k: int) -> Tensor:
    """Ascending positions of the k largest keys above 0; ties go to the lowest position."""
    k = min(k, keys.numel())
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=keys.device)
    threshold = keys.topk(k).values[-1].clamp(min=1)
    above = (keys > threshold).nonzero().flatten()
    equal = (keys == threshold).nonzero().flatten()[: k - above.numel()]
    return torch.cat([above, equal]).sort().values

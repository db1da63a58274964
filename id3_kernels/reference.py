"""Every op of the table in plain torch: the readable specification, the fallback, the oracle of the tests.

Arguments and results are those of `ops.py`. Selection goes tensor by tensor, so nothing larger than a
few temporaries of the largest tensor is alive at once.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .entries import Entries, runs, sort_keys
from .norm import norm_scale, norm_total, square_units


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- score -----------------------------------------------------------------------------------------


def d3_score(param: Tensor, grad: Tensor, eps: float, exp: float) -> Tensor:
    wide = wide_dtype(param.dtype)
    g = grad.to(wide).abs()
    score = g if exp == 0 else _divide(g, param.to(wide).abs() + eps, exp)
    tiny = torch.finfo(wide).tiny
    return torch.where((g < tiny) | (score < tiny), torch.zeros_like(score), score).contiguous()


def _divide(g: Tensor, d: Tensor, exp: float) -> Tensor:
    """|g| / d^exp with every operation rounded once."""
    special = {
        0.5: lambda: g / _sqrt(d),
        1.0: lambda: g / d,
        2.0: lambda: g / (d * d),
        -0.5: lambda: g * _sqrt(d),
        -1.0: lambda: g * d,
        -2.0: lambda: g * (d * d),
    }
    if exp in special:
        return special[exp]()
    return (g.double() / d.double().pow(exp)).to(g.dtype)


def _sqrt(x: Tensor) -> Tensor:
    """The IEEE root; torch's on CPU may be a vector library's, which misses the last bit of one in five."""
    if x.device.type != "cpu":
        return x.sqrt()
    return torch.from_numpy(np.sqrt(x.detach().reshape(-1).numpy())).reshape(x.shape)


def _order_key(score: Tensor) -> Tensor:
    """The score's bits as an integer, which order as the score does; 0 where it can not be selected."""
    integer, lowest, infinite = (
        (torch.int64, 1 << 52, 0x7FF << 52)
        if score.dtype == torch.float64
        else (torch.int32, 1 << 23, 0xFF << 23)
    )
    bits = score.contiguous().view(integer)
    return torch.where((bits >= lowest) & (bits < infinite), bits, torch.zeros_like(bits))


# --- selection -------------------------------------------------------------------------------------


def select_topk(params, grads, offsets, indices, k, capacity, eps, exp):
    def score(j):
        return None if grads[j] is None else d3_score(params[j], grads[j], eps, exp)

    dtype = wide_dtype(params[0].dtype) if params else torch.float32
    return _select(score, len(params), offsets, indices, k, capacity, dtype)


def select_topk_by_score(scores, offsets, indices, k, capacity):
    dtype = next((s.dtype for s in scores if s is not None), torch.float32)
    return _select(scores.__getitem__, len(scores), offsets, indices, k, capacity, dtype)


def _select(score_of, n_tensors: int, offsets, indices, k: Tensor, capacity: int, dtype: torch.dtype):
    device, k = offsets.device, _wanted(k, capacity)
    active = [Entries(run, indices).lists() for run in runs(offsets)]
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    keys = torch.empty(0, dtype=integer, device=device)  # of the best k so far, in entry order
    index = torch.empty(0, dtype=torch.int64, device=device)
    owner = torch.empty(0, dtype=torch.int64, device=device)
    for j in range(n_tensors if k else 0):
        score = score_of(j)
        if score is None or score.numel() == 0:
            continue
        key = _order_key(score).reshape(-1)
        for run in active:
            key[run[j].to(torch.int64)] = 0
        here = _best(key, k)
        keys, index = torch.cat([keys, key[here]]), torch.cat([index, here])
        owner = torch.cat([owner, torch.full_like(here, j)])
        kept = _best(keys, k)
        keys, index, owner = keys[kept], index[kept], owner[kept]
    edges = torch.arange(n_tensors + 1, device=device)
    winners = [_padded(x, capacity) for x in (index.to(torch.int32), keys.view(dtype))]
    return torch.searchsorted(owner, edges), *winners


def _wanted(k: Tensor, capacity: int) -> int:
    return min(max(int(k), 0), capacity)


def _best(keys: Tensor, k: int) -> Tensor:
    """Ascending positions of the k largest keys above 0; ties go to the lowest position."""
    k = min(k, keys.numel())
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=keys.device)
    threshold = keys.topk(k).values[-1].clamp(min=1)
    above = (keys > threshold).nonzero().flatten()
    equal = (keys == threshold).nonzero().flatten()[: k - above.numel()]
    return torch.cat([above, equal]).sort().values


def _padded(values: Tensor, length: int) -> Tensor:
    out = values.new_zeros(length)
    out[: values.numel()] = values
    return out


def collect_(
    param, grad, score, offsets, indices, values, add, position, best_score, best_place, best_grad, state, k,
    again, eps, exp,
):  # fmt: skip
    """Keeps what a step needs of one tensor's gradient, so that the gradient can go.

    offsets [2] or [R, 2]: which of `indices` and `values` are the tensor's. These values (float32, float64
    for float64) become, or with `add` grow by, the gradient at their indices. best_score, best_place
    (position << 32 | flat index), best_grad [room] hold candidates, in any order, among them the best k of
    all tensors so far (ties to the lowest place); nobody: 0, -1, 0. Scores are D3's, or `score`. `again`:
    entries of this tensor may be held; the larger score stays, else the older. k is the same until the
    candidates are forgotten. state: int64, the backend's
    own, zeros while there are no candidates (`backend.candidate_room` says how long, and how much room).
    """
    rows = [slice(*run.tolist()) for run in runs(offsets)]
    for row in rows:
        gradient = _read(grad, indices[row]).to(values.dtype)
        values[row].add_(gradient) if add else values[row].copy_(gradient)
    k = _wanted(k, best_score.numel())
    if k == 0:
        return
    key = _order_key(d3_score(param, grad, eps, exp) if score is None else score).reshape(-1)
    for row in rows:
        key[indices[row].to(torch.int64)] = 0
    index = _best(key, k)
    keep_best_(grad, position, index, key[index].view(values.dtype), best_score, best_place, best_grad, again)


def keep_best_(grad, position, index, score, best_score, best_place, best_grad, again):
    """Merges entries of one tensor (int64 index, score; a score of 0 is none) into the best so far."""
    k, found = best_score.numel(), score > 0
    place = torch.cat([best_place, torch.where(found, (position << 32) | index, -1)])
    held = _read(grad, torch.where(found, index, 0)).to(best_grad.dtype)
    held = torch.cat([best_grad, torch.where(found, held, 0)])
    score = torch.cat([best_score, score])
    place, order = place.sort(stable=True)  # of equal places the older comes first
    score, held = score[order], held[order]
    if again:
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


# --- sets of entries -------------------------------------------------------------------------------


def union(a_offsets, a_indices, b_offsets, b_indices):
    a, b = Entries(a_offsets, a_indices), Entries(b_offsets, b_indices)
    n_a, n_b = a_indices.numel(), b_indices.numel()
    both = torch.cat([sort_keys(a, n_a), sort_keys(b, n_b)])
    merged, position = torch.unique(both, sorted=True, return_inverse=True)
    edges = torch.arange(a_offsets.numel(), device=a_offsets.device) << 32
    offsets = torch.searchsorted(merged, edges)
    indices = _padded((merged & 0xFFFFFFFF).to(torch.int32), n_a + n_b)
    return offsets, indices, position[:n_a].clone(), position[n_a:].clone()


def join_(arrays, offsets, b_offsets, b_indices, b_values):
    """Inserts the entries b, none of them held, into arrays of room for all: b_indices into the first, which
    holds the indices; b_values[i] (None: zeros) into arrays[i + 1]."""
    n, n_new = int(offsets[-1]), int(b_offsets[-1])
    held, new = Entries(offsets, arrays[0]), Entries(b_offsets, b_indices)
    position = torch.searchsorted(sort_keys(held, n), sort_keys(new, n_new))
    position += torch.arange(n_new, device=position.device)
    stays = torch.ones(n + n_new, dtype=torch.bool, device=position.device)
    stays[position] = False
    for array, values in zip(arrays, [b_indices, *b_values], strict=True):
        old = array[:n].clone()
        array[: n + n_new][stays] = old
        array[position] = 0 if values is None else values[:n_new]
    offsets.add_(b_offsets)


def gather(tensors, offsets, indices):
    parts = [_read(t, i) for t, i in zip(tensors, Entries(offsets, indices).lists(), strict=True)]
    return _padded(torch.cat(parts), indices.numel()) if parts else torch.empty(0, device=indices.device)


def scatter_(tensors, offsets, indices, values):
    bounds = offsets.tolist()
    for j, t in enumerate(tensors):
        _write(t, indices[bounds[j] : bounds[j + 1]], values[bounds[j] : bounds[j + 1]])


def squared_norm(tensors, offsets, indices):
    values = [torch.zeros(1, dtype=torch.float64, device=indices.device)]
    for run in runs(offsets):
        rows = zip(tensors, Entries(run, indices).lists(), strict=True)
        values += [_read(t, i).double() for t, i in rows if t is not None]
    values = torch.cat(values).abs()
    largest = values.max()  # NaN where there is one
    scale = norm_scale(largest)
    high, low = square_units(torch.where(largest.isfinite(), values, 0) / scale)
    return norm_total(largest, high.sum(), low.sum(), scale)


def _read(tensor: Tensor, index: Tensor) -> Tensor:
    index = index.to(torch.int64)
    if tensor.is_contiguous():
        return tensor.view(-1)[index]
    return tensor[torch.unravel_index(index, tensor.shape)]


def _write(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    index = index.to(torch.int64)
    if tensor.is_contiguous():
        tensor.view(-1)[index] = values
    else:
        tensor[torch.unravel_index(index, tensor.shape)] = values


# --- update ----------------------------------------------------------------------------------------


def adamw_(params, grads, offsets, indices, exp_avg, exp_avg_sq, master, age, step, *rest):
    for run in runs(offsets):
        values = [
            None if g is None else _read(g, i).to(wide_dtype(p.dtype))
            for p, g, i in zip(params, grads, Entries(run, indices).lists(), strict=True)
        ]
        _adamw(params, values, run, indices, exp_avg, exp_avg_sq, master, age, step, *rest)


def adamw_compact_(params, values, offsets, indices, exp_avg, exp_avg_sq, master, age, step, *rest):
    for run in runs(offsets):
        bounds = run.tolist()
        wide = [values[bounds[j] : bounds[j + 1]].to(wide_dtype(p.dtype)) for j, p in enumerate(params)]
        _adamw(params, wide, run, indices, exp_avg, exp_avg_sq, master, age, step, *rest)


def _adamw(
    params, values, offsets, indices, exp_avg, exp_avg_sq, master, age, step,
    lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, clip, tensor_lr,
):  # fmt: skip
    lr = lr if tensor_lr is None else tensor_lr.item()
    if found_inf is not None and found_inf.item() != 0:
        return
    bounds, steps = offsets.tolist(), step.tolist()
    for j, (param, g) in enumerate(zip(params, values, strict=True)):
        here = slice(bounds[j], bounds[j + 1])
        if g is None or here.start == here.stop:
            continue
        if grad_scale is not None:
            g = g / grad_scale.to(g.dtype)
        if clip is not None:
            g = g * clip.to(g.dtype)
        if maximize:
            g = -g
        w = _weight(param, indices[here], None if master is None else master[here])
        w = w * (1 - lr * weight_decay)
        m, v = exp_avg[here], exp_avg_sq[here]
        m.copy_(m + (g - m) * (1 - beta1))
        v.copy_(v * beta2 + (g * (1 - beta2)) * g)
        if age is not None:
            age[here] += 1
        step_size, root = _bias_corrections(steps[j] if age is None else age[here], lr, beta1, beta2, w)
        w = w - (step_size * m) / (_sqrt(v) / root + eps)
        _write(param, indices[here], w.to(param.dtype))
        if master is not None and param.dtype in (torch.bfloat16, torch.float16):
            master[here] = w


def _weight(param: Tensor, index: Tensor, master: Tensor | None) -> Tensor:
    """The weight to update: the master, unless the parameter no longer is its rounding."""
    stored = _read(param, index)
    w = stored.to(wide_dtype(param.dtype))
    if master is None or param.dtype not in (torch.bfloat16, torch.float16):
        return w
    rounded = master.to(param.dtype)
    same = (rounded == stored) | (rounded.isnan() & stored.isnan())
    return torch.where(same, master, w)


def _bias_corrections(steps: int | Tensor, lr: float, beta1: float, beta2: float, like: Tensor):
    """lr / (1 - beta1^s) and sqrt(1 - beta2^s): in float64, rounded once to the dtype of `like`."""
    if isinstance(steps, int):
        pair = lr / (1 - beta1**steps), math.sqrt(1 - beta2**steps)
        return tuple(torch.tensor(x, dtype=like.dtype, device=like.device) for x in pair)
    # Python's pow is the C library's, as in the C++ kernels; torch's vectorised one differs by an ulp.
    distinct, which = steps.unique(return_inverse=True)
    pairs = [(lr / (1 - beta1**s), math.sqrt(1 - beta2**s)) for s in distinct.tolist()]
    table = torch.tensor(pairs, dtype=torch.float64, device=like.device).reshape(-1, 2).to(like.dtype)
    return table[which, 0], table[which, 1]

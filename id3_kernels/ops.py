"""The public functions: they check their arguments, call an op of `table.py` and return exact sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend, checks, table
from .entries import Entries
from .reference import wide_dtype


def _kernels(device: torch.device):
    return table.kernels_for(device, backend.requested())


@torch.no_grad()
def d3_score(param: Tensor, grad: Tensor, *, eps: float, exp: float) -> Tensor:
    """|g| / (|θ| + eps)^exp of every entry (paper, equation 1), in float32 (float64 for float64).

    param: any shape, float32, bfloat16, float16 or float64. grad: the same shape; float32 is allowed for
    a bfloat16 or float16 param. Returns a new contiguous tensor of param's shape: 0 where |g| or the score
    is subnormal, NaN and Inf as they fall. Mutates nothing. Raises ValueError for other shapes or dtypes
    and for eps <= 0 with exp > 0.
    """
    checks.d3(eps, exp)
    checks.plain("param", param)
    checks.gradient("grad", grad, param)
    return _kernels(param.device).d3_score(param, grad, eps, exp)


@torch.no_grad()
def select_topk(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    active: Entries | None,
    k: int,
    *,
    eps: float,
    exp: float,
) -> tuple[Entries, Tensor]:
    """The k entries of largest D3 score outside `active`, over all tensors (paper, algorithm 1 and eq. 2).

    params, grads: lists of M tensors as for `d3_score`, on one device; grads[j] None: no entry of tensor j
    is selected. active: the entries to leave out, or None. Only finite scores above 0 are selected; ties go
    to the lowest (tensor, flat index). Returns (Entries of at most k, their scores [n], float32 or float64)
    in entry order: exact, and the same entries on every backend for exp in {0, ±½, ±1, ±2}. With exp = 0
    params are not read. Mutates nothing; synchronises on a GPU. Raises ValueError naming the argument.
    """
    checks.count(k)
    checks.d3(eps, exp)
    device = checks.params(params)
    checks.grads(grads, params)
    active = _active(active, [p.numel() for p in params], device)
    wanted = _wanted(k, sum(p.numel() for p in params), device)
    kernels = _kernels(device)
    return _exact(*kernels.select_topk(list(params), list(grads), *active, *wanted, float(eps), float(exp)))


@torch.no_grad()
def select_topk_by_score(
    scores: Sequence[Tensor | None], active: Entries | None, k: int
) -> tuple[Entries, Tensor]:
    """`select_topk` of given scores.

    scores: M tensors, all float32 or all float64, any shapes, on one device; None: no entry of that
    tensor is selected. Subnormal, negative, NaN and infinite scores are never selected. Result and errors as
    for `select_topk`. Mutates nothing.
    """
    checks.count(k)
    given = [s for s in scores if s is not None]
    device = checks.params(given, "scores")
    for j, s in enumerate(given):
        if s.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"scores[{j}]: expected float32 or float64, got {s.dtype}")
    sizes = [0 if s is None else s.numel() for s in scores]
    if active is not None:  # the size of a tensor without scores is not known
        checks.entries("active", active, [2**31 if s is None else s.numel() for s in scores], device)
    active = active or Entries.empty(len(scores), device)
    return _exact(
        *_kernels(device).select_topk_by_score(list(scores), *active, *_wanted(k, sum(sizes), device))
    )


def _wanted(k: int, at_most: int, device: torch.device) -> tuple[Tensor, int]:
    """k as the ops take it: a tensor, and a capacity."""
    capacity = min(k, at_most)
    return torch.full((1,), capacity, dtype=torch.int64, device=device), capacity


def _active(active: Entries | None, sizes: list[int], device: torch.device) -> Entries:
    if active is None:
        return Entries.empty(len(sizes), device)
    checks.entries("active", active, sizes, device)
    return active


def _exact(offsets: Tensor, indices: Tensor, scores: Tensor) -> tuple[Entries, Tensor]:
    n = int(offsets[-1])
    return Entries(offsets, indices[:n]), scores[:n]


@torch.no_grad()
def union(a: Entries, b: Entries) -> tuple[Entries, Tensor, Tensor]:
    """The entries of both sets, in order; an entry of both occurs once.

    Returns (union, int64 [n_a], int64 [n_b]): the places of a's and of b's entries in the union's indices.
    Mutates nothing. Raises ValueError if the sets differ in the number of tensors or are not ascending.
    """
    device = a.offsets.device
    checks.entries("a", a, None, device)
    checks.entries("b", b, None, device)
    if a.offsets.numel() != b.offsets.numel():
        raise ValueError(f"b: expected {a.offsets.numel() - 1} tensors as in a, got {b.offsets.numel() - 1}")
    a, b = a.trimmed(), b.trimmed()
    offsets, indices, pos_a, pos_b = _kernels(device).union(*a, *b)
    return Entries(offsets, indices).trimmed(), pos_a, pos_b


@torch.no_grad()
def gather(tensors: Sequence[Tensor], entries: Entries) -> Tensor:
    """The values at `entries`, [n] in entry order, in the dtype that all tensors share.

    Mutates nothing. Raises ValueError for mixed dtypes and for entries that do not fit the tensors.
    """
    entries = _fitting(tensors, entries)
    return _kernels(tensors[0].device).gather(list(tensors), *entries)


@torch.no_grad()
def scatter_(tensors: Sequence[Tensor], entries: Entries, values: Tensor) -> None:
    """Writes values [n] (the tensors' dtype) to `entries`. Mutates `tensors` there and nowhere else.

    Raises ValueError for mixed dtypes and for entries or values that do not fit the tensors.
    """
    entries = _fitting(tensors, entries)
    checks.vector("values", values, tensors[0].dtype, entries.indices.numel(), tensors[0].device)
    _kernels(tensors[0].device).scatter_(list(tensors), *entries, values)
    torch.autograd.graph.increment_version(tensors)


@torch.no_grad()
def sampled_weight_grad_(
    left: Tensor, right: Tensor, entries: Entries, values: Tensor, *, add: bool = True
) -> None:
    """The gradient leftᵀ · right of one weight at `entries` alone (a sampled dense-dense product).

    left: [T, rows], right: [T, columns], of T tokens, one dtype and any strides. Of torch.nn.Linear left is
    the gradient of the output and right the input; of a weight stored transposed, as Conv1D's, the other
    way round. entries: of the one weight [rows, columns]. values: [>= n], float32 (float64 for float64), in
    entry order: they grow by the sums, or become them with add=False. An entry has the same bits whatever
    the other entries, strides, threads and backend; `csrc/formulas/sampled.h` has the order of the sums and
    the error bound.
    Mutates values. Raises ValueError naming the argument.
    """
    checks.factors(left, right)
    _sampled("sampled_weight_grad_", left, right, entries, values, add, left.shape[1] * right.shape[1])


@torch.no_grad()
def sampled_embedding_grad_(
    grad: Tensor, ids: Tensor, entries: Entries, values: Tensor, *, add: bool = True
) -> None:
    """The gradient of one embedding at `entries` alone: sums over the tokens that read the row.

    grad: [T, columns], the gradient of the output, any strides. ids: int64 [T], the row that each token
    reads; -1 leaves a token out. entries, values, add: as for `sampled_weight_grad_`. A sum takes tokens in
    ascending order, from zero. Mutates values. Raises ValueError naming the argument.
    """
    checks.matrix("grad", grad)
    checks.vector("ids", ids, torch.int64, grad.shape[0], grad.device)
    if ids.numel() != grad.shape[0]:
        raise ValueError(f"ids: expected {grad.shape[0]} tokens as grad, got {ids.numel()}")
    _sampled("sampled_embedding_grad_", grad, ids, entries, values, add, 2**31 - 1)


def _sampled(op: str, first, second, entries: Entries, values, add: bool, size: int) -> None:
    checks.entries("entries", entries, [size], first.device)
    checks.vector("values", values, wide_dtype(first.dtype), int(entries.offsets[-1]), first.device)
    getattr(_kernels(first.device), op)(first, second, *entries, values, add)
    torch.autograd.graph.increment_version(values)


def _fitting(tensors: Sequence[Tensor], entries: Entries) -> Entries:
    device = checks.params(tensors, "tensors")
    for j, t in enumerate(tensors):
        if t.dtype != tensors[0].dtype:
            raise ValueError(f"tensors[{j}]: expected {tensors[0].dtype} as tensors[0], got {t.dtype}")
    checks.entries("entries", entries, [t.numel() for t in tensors], device)
    return entries.trimmed()


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    entries: Entries,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    age: Tensor | None = None,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """One AdamW step on `entries` alone, for all tensors in one call: gather, update, scatter.

    params, grads: as for `select_topk`; entries of a tensor without gradient do not change.
    exp_avg, exp_avg_sq: [>= n] float32 (float64 for float64), in entry order. master: the same, the
    float32 weights of bfloat16 and float16 params; or None. Where a param is
    not its master's rounding, the param replaces the master. step: the number of this step, from 1, or
    int64 [M], one per tensor. age: int32 [>= n], steps since an entry joined; it grows by 1 and
    corrects the bias in place of step. grad_scale, found_inf, clip: one-element tensors: gradients are
    divided by grad_scale, multiplied by clip; where found_inf is not 0, nothing changes. lr may
    be a one-element tensor, which the host does not read. The arithmetic is torch.optim.AdamW's
    (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).
    Mutates params at entries, exp_avg, exp_avg_sq, master, age. Raises ValueError naming the argument.
    """
    checks.params(params)
    checks.grads(grads, params)
    _adamw("adamw_", params, list(grads), entries, (exp_avg, exp_avg_sq, master, age), step,
           (lr, beta1, beta2, eps, weight_decay), maximize, (grad_scale, found_inf, clip))  # fmt: skip


@torch.no_grad()
def adamw_compact_(
    params: Sequence[Tensor],
    values: Tensor,
    entries: Entries,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    age: Tensor | None = None,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """`adamw_` from gradient values [n] that are already gathered, in entry order.

    values: float32, or the params' dtype (float64 for float64). Everything else as for `adamw_`.
    """
    checks.params(params)
    allowed = (torch.float64,) if params[0].dtype == torch.float64 else checks.FLOATS[:3]
    if values.dtype not in allowed:
        raise ValueError(f"values: expected {' or '.join(map(str, allowed))}, got {values.dtype}")
    _adamw("adamw_compact_", params, values, entries, (exp_avg, exp_avg_sq, master, age), step,
           (lr, beta1, beta2, eps, weight_decay), maximize, (grad_scale, found_inf, clip))  # fmt: skip


def _adamw(op, params, gradient, entries, state, step, numbers, maximize, scalars) -> None:
    device = params[0].device
    checks.entries("entries", entries, [p.numel() for p in params], device)
    n, wide = int(entries.offsets[-1]), wide_dtype(params[0].dtype)
    if isinstance(gradient, Tensor):
        checks.vector("values", gradient, gradient.dtype, n, device)
    names = ("exp_avg", "exp_avg_sq", "master", "age")
    for name, tensor, dtype in zip(names, state, (wide, wide, wide, torch.int32), strict=True):
        if tensor is not None or name.startswith("exp"):
            checks.vector(name, tensor, dtype, n, device)
    for name, tensor in zip(("grad_scale", "found_inf", "clip"), scalars, strict=True):
        if tensor is not None and (tensor.numel() != 1 or tensor.device != device):
            raise ValueError(
                f"{name}: expected one element on {device}, got {tuple(tensor.shape)} on {tensor.device}"
            )
    lr, tensor_lr = checks.learning_rate(numbers[0], device)
    numbers = (lr, *numbers[1:])
    checks.adamw_numbers(step, numbers)
    if isinstance(step, int):
        step = torch.full((len(params),), step, dtype=torch.int64, device=device)
    checks.vector("step", step, torch.int64, len(params), device)
    getattr(_kernels(device), op)(
        list(params), gradient, *entries, *state, step, *map(float, numbers), maximize, *scalars,
        tensor_lr,
    )  # fmt: skip
    torch.autograd.graph.increment_version(params)

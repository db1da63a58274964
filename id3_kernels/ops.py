"""THE OP TABLE: per op one schema, one fake and one checked public function.

The schemas are the internal forms, made so that nobody has to ask a GPU for a number. How many entries are
wanted is a tensor `k` (int64, one element) and at most `capacity`; results are capacity-sized and their true
length is `offsets[-1]`; behind it selections hold zeros, and others anything. Offsets begin at 0 but in
`select_topk`, `select_topk_by_score`, `collect_`, `squared_norm`, `adamw_` and `adamw_compact_`, where they
are places in `indices` and its companions: a part of the offsets names a part of the tensors.

These six read an active set as one run of entries, offsets [M + 1], or as R runs, offsets [R, M + 1]: row r
says where tensor j's entries of run r stand, indices[offsets[r, j] : offsets[r, j + 1]], ascending. Rows may
be rows of a wider tensor (stride 1 inside a row); no entry is in two runs; what stands between runs is no
entry, and is neither read nor changed. No result depends on how a set is split into runs. On the CPU R is
at most 8. `squared_norm` has the same bits for every order and grouping of entries, number of threads and
backend; NaN at an entry makes it NaN, else an infinity makes it infinite (csrc/formulas/norm.h: how it is
summed, the error bound).

The public functions take one run, check their arguments and return exact sizes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from . import backend, checks, reference
from .entries import Entries

_ADAMW = (
    "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? master, Tensor(e!)? age, Tensor step, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? clip, Tensor? tensor_lr) -> ()"
)
SCHEMAS = {
    "d3_score": "(Tensor param, Tensor grad, float eps, float exp) -> Tensor",
    "select_topk": "(Tensor[] params, Tensor?[] grads, Tensor offsets, Tensor indices, Tensor k, "
    "SymInt capacity, float eps, float exp) -> (Tensor, Tensor, Tensor)",
    "select_topk_by_score": "(Tensor?[] scores, Tensor offsets, Tensor indices, Tensor k, SymInt capacity) "
    "-> (Tensor, Tensor, Tensor)",
    "collect_": "(Tensor param, Tensor grad, Tensor? score, Tensor offsets, Tensor indices, "
    "Tensor(a!) values, bool add, int position, Tensor(b!) best_score, Tensor(c!) best_place, "
    "Tensor(d!) best_grad, Tensor(e!) state, Tensor k, bool again, float eps, float exp) -> ()",
    "union": "(Tensor a_offsets, Tensor a_indices, Tensor b_offsets, Tensor b_indices) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "join_": "(Tensor(a!)[] arrays, Tensor(b!) offsets, Tensor b_offsets, Tensor b_indices, "
    "Tensor?[] b_values) -> ()",
    "gather": "(Tensor[] tensors, Tensor offsets, Tensor indices) -> Tensor",
    "scatter_": "(Tensor(a!)[] tensors, Tensor offsets, Tensor indices, Tensor values) -> ()",
    "squared_norm": "(Tensor?[] tensors, Tensor offsets, Tensor indices) -> Tensor",
    "adamw_": "(Tensor(a!)[] params, Tensor?[] grads, Tensor offsets, Tensor indices, " + _ADAMW,
    "adamw_compact_": "(Tensor(a!)[] params, Tensor values, Tensor offsets, Tensor indices, " + _ADAMW,
}


# --- fakes: the shapes of the results --------------------------------------------------------------


def _selection_fake(offsets: Tensor, capacity: int, dtype: torch.dtype):
    return (
        offsets.new_empty(offsets.shape[-1]),
        offsets.new_empty(capacity, dtype=torch.int32),
        offsets.new_empty(capacity, dtype=dtype),
    )


def _union_fake(a_offsets, a_indices, b_offsets, b_indices):
    n_a, n_b = a_indices.numel(), b_indices.numel()
    position = [a_offsets.new_empty(n) for n in (n_a, n_b)]
    return torch.empty_like(a_offsets), a_indices.new_empty(n_a + n_b), *position


FAKES: dict[str, Callable] = {
    "d3_score": lambda param, grad, eps, exp: torch.empty(
        param.shape, dtype=reference.wide_dtype(param.dtype), device=param.device
    ),
    "select_topk": lambda params, grads, offsets, indices, k, capacity, eps, exp: _selection_fake(
        offsets, capacity, reference.wide_dtype(params[0].dtype) if params else torch.float32
    ),
    "select_topk_by_score": lambda scores, offsets, indices, k, capacity: _selection_fake(
        offsets, capacity, next((s.dtype for s in scores if s is not None), torch.float32)
    ),
    "collect_": lambda *_: None,
    "union": _union_fake,
    "join_": lambda *_: None,
    "gather": lambda tensors, offsets, indices: tensors[0].new_empty(indices.numel()),
    "scatter_": lambda *_: None,
    "squared_norm": lambda tensors, offsets, indices: offsets.new_empty((), dtype=torch.float64),
    "adamw_": lambda *_: None,
    "adamw_compact_": lambda *_: None,
}


# --- registration ----------------------------------------------------------------------------------


def _on_gpu(name: str) -> Callable:
    """The CUDA or Triton kernel, imported at the first call, so that importing id3_kernels stays light."""

    def call(*args):
        kernels = reference if _has_float64(args) else backend.for_gpu()
        return getattr(kernels, name)(*args)

    return call


def _has_float64(args: tuple) -> bool:
    """Whether the tensors to work on are float64, which the GPU kernels leave to the reference."""
    tensors = [t for arg in args[:2] for t in (arg if isinstance(arg, list | tuple) else [arg])]
    return any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)


_library = torch.library.Library("id3", "DEF")  # lives as long as the module: dropping it unregisters the ops
_cuda_library = torch.library.Library("id3_cuda", "DEF")  # implemented by csrc/cuda, called by cuda.py
_has_gpu_kernels = any(map(importlib.util.find_spec, ("triton", "id3_kernels._cuda")))
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _cuda_library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    if _has_gpu_kernels:
        _library.impl(_name, _on_gpu(_name), "CUDA")
    torch.library.register_fake(f"id3::{_name}", FAKES[_name], lib=_library)
backend.native()  # registers the C++ kernels

DISPATCHED = SimpleNamespace(**{name: getattr(torch.ops.id3, name).default for name in SCHEMAS})


def _kernels(device: torch.device):
    return backend.kernels_for(device, backend.wish())


# --- the public functions --------------------------------------------------------------------------


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

    params, grads: lists of M tensors as for `d3_score`, on one device; grads[j] None: nothing of tensor j.
    active: the entries to leave out, None for none. Only finite scores above 0 are selected; ties go to
    the lowest (tensor, flat index). Returns (Entries of at most k, their scores [n], float32 or float64)
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
    """`select_topk` for scores that somebody else computed.

    scores: M tensors, all float32 or all float64, any shapes, on one device; None: nothing of that tensor
    is selectable. Subnormal, negative, NaN and infinite scores are never selected. Result and errors as
    for `select_topk`. Mutates nothing.
    """
    checks.count(k)
    given = [s for s in scores if s is not None]
    device = checks.params(given, "scores")
    for j, s in enumerate(given):
        if s.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"scores[{j}]: expected float32 or float64, got {s.dtype}")
    sizes = [0 if s is None else s.numel() for s in scores]
    if active is not None:  # entries of a tensor without scores may be active, whatever its size
        checks.entries("active", active, [2**31 if s is None else s.numel() for s in scores], device)
    active = active or Entries.empty(len(scores), device)
    return _exact(
        *_kernels(device).select_topk_by_score(list(scores), *active, *_wanted(k, sum(sizes), device))
    )


def _wanted(k: int, at_most: int, device: torch.device) -> tuple[Tensor, int]:
    """k as the kernels take it: a tensor, and the room for so many."""
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
    """The entries of both sets, in order; an entry of both stands once.

    Returns (union, positions of a's entries int64 [n_a], positions of b's int64 [n_b]), positions being
    places in the union's indices. Mutates nothing. Raises ValueError if the sets differ in the number of
    tensors or are not ascending.
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

    params, grads: as for `select_topk`; entries of a tensor without gradient do not change at all.
    exp_avg, exp_avg_sq: [>= n] float32 (float64 for float64), in entry order. master: the same, the
    float32 weights of bfloat16 and float16 params; None: computed from the param and rounded back. Where a
    param is no longer its master's rounding, the param wins. step: the number of this step, from 1, or
    int64 [M], one per tensor. age: int32 [>= n], steps since an entry joined; advanced here and used for
    the bias correction in place of step. grad_scale, found_inf, clip: one-element tensors: gradients are
    divided by grad_scale, multiplied by clip; found_inf other than 0: nothing changes. lr may be
    a one-element tensor, which is read where it lies. The arithmetic is torch.optim.AdamW's
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
    n, wide = int(entries.offsets[-1]), reference.wide_dtype(params[0].dtype)
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

"""The op table: the contract, the schema and the fake of every op, and the code that runs it.

The ops are the internal forms of the functions in `ops.py`, which check arguments and return exact sizes.
An op makes the host read no number from a GPU. A number of entries that only the device knows is a tensor `k`
(int64, one element), at most `capacity`; a result has room for `capacity` entries, and the last element of
its offsets is the number that it holds. Elements after the last entry are padding: an op ignores the padding
of its arguments, and the padding of a result may hold any value unless the contract names one.

In every op M is the number of tensors, `offsets` is int64 [M + 1] and does not decrease, and entry i of
tensor j is `indices[offsets[j] + i]`: int32, flat and row-major, ascending within the tensor. Offsets begin
at 0 unless the contract says that they may be an active set's. `position` is the number
of a tensor among all tensors, and an entry's place in the order of entries is `position << 32 | flat index`.

The offsets of an active set are those of one run of entries, [M + 1], or of R runs, [R, M + 1] (R <= 8 on the
CPU): row r says which of `indices` and of the tensors parallel to it are run r's. A row has stride 1, may
begin later than at 0, and may be a part of a longer row, which then names the entries of a part of the
tensors. No entry is in two runs; elements that belong to no run are padding. No result depends on the split
into runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend, reference
from .reference import wide_dtype


class Op(NamedTuple):
    """One op. fake: the results' shapes and dtypes for fake tensors. contract: one paragraph."""

    schema: str
    fake: Callable
    contract: str


def _no_result(*_) -> None:
    """The fake of an op that only mutates."""


def _selection(offsets: Tensor, capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, indices and scores of a selection."""
    indices, scores = (offsets.new_empty(capacity, dtype=d) for d in (torch.int32, dtype))
    return offsets.new_empty(offsets.shape[-1]), indices, scores


def _union(a_offsets, a_indices, b_offsets, b_indices) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_a, n_b = a_indices.numel(), b_indices.numel()
    positions = [a_offsets.new_empty(n) for n in (n_a, n_b)]
    return torch.empty_like(a_offsets), a_indices.new_empty(n_a + n_b), *positions


_ADAMW_SCHEMA = """Tensor offsets, Tensor indices, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)?
    master, Tensor(e!)? age, Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay,
    bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? clip, Tensor? tensor_lr) -> ()"""
_ADAMW_CONTRACT = """The offsets may be an active set's; exp_avg, exp_avg_sq, master and age are parallel to
    `indices`. exp_avg, exp_avg_sq: the moments, float32 (float64 for float64). master: float32 weights of
    bfloat16 and float16 params, or None: the param itself; where a param is not its master's rounding, the
    param replaces the master. age: int32, steps since the entry joined, or None; it grows by 1 and then
    corrects the bias in place of step. step: int64 [M], the number of this step, from 1. lr, beta1, beta2,
    eps, weight_decay, maximize: as in torch.optim.AdamW; tensor_lr: one element that replaces lr, or None.
    grad_scale, found_inf, clip: one element each, or None; a gradient is divided by grad_scale and
    multiplied by clip, and nothing changes where found_inf is not 0. Mutates params, exp_avg, exp_avg_sq,
    master and age, at the entries alone."""

OPS = {
    "d3_score": Op(
        "(Tensor param, Tensor grad, float eps, float exp) -> Tensor",
        lambda param, grad, eps, exp: torch.empty(
            param.shape, dtype=wide_dtype(param.dtype), device=param.device
        ),
        """The score |grad| / (|param| + eps)^exp of each entry, each operation rounded once. param: any
        shape and strides. grad: the same shape, in param's dtype, or float32 for a bfloat16 or float16
        param. Returns a contiguous tensor of that shape, float32 (float64 for float64), with 0 where |grad|
        or the score is subnormal. Mutates nothing.""",
    ),
    "select_topk": Op(
        """(Tensor[] params, Tensor?[] grads, Tensor offsets, Tensor indices, Tensor k, SymInt capacity,
        float eps, float exp) -> (Tensor, Tensor, Tensor)""",
        lambda params, grads, offsets, indices, k, capacity, eps, exp: _selection(
            offsets, capacity, wide_dtype(params[0].dtype) if params else torch.float32
        ),
        """The k entries of the largest `d3_score` (of eps, exp) among all entries that are not active.
        params, grads: M tensors as for `d3_score`; a tensor whose grad is None takes no part. offsets,
        indices: the active set. k is clamped to 0 … capacity. Returns
        (offsets from 0, indices [capacity], scores [capacity], float32 or float64) in entry order, padded
        with zeros. Only finite scores above 0 are selected, so there may be fewer than k; ties go to the
        lowest (tensor, flat index). With exp = 0 params are not read. Mutates nothing.""",
    ),
    "select_topk_by_score": Op(
        """(Tensor?[] scores, Tensor offsets, Tensor indices, Tensor k, SymInt capacity) -> (Tensor, Tensor,
        Tensor)""",
        lambda scores, offsets, indices, k, capacity: _selection(
            offsets, capacity, next((s.dtype for s in scores if s is not None), torch.float32)
        ),
        """`select_topk` of given scores. scores: M tensors of any shape, all float32 or all float64; a
        tensor whose score is None takes no part, but may have active entries. offsets, indices, k, capacity
        and the result: as for `select_topk`. Subnormal, negative, infinite and
        NaN scores are not selected. Mutates nothing.""",
    ),
    "collect_": Op(
        """(Tensor param, Tensor grad, Tensor? score, Tensor offsets, Tensor indices, Tensor(a!) values,
        bool add, int place, Tensor(b!) best_score, Tensor(c!) best_place, Tensor(d!) best_grad,
        Tensor(e!) state, Tensor k, bool may_hold, float eps, float exp) -> ()""",
        _no_result,
        """Takes from the grad of one tensor what a step needs, so that grad can be freed. param, grad: as
        for `d3_score`. offsets [2] or [R, 2], indices: the active set of the tensor. values (parallel to
        indices, float32, float64 for float64) become the gradient at these entries, or grow by it with add.
        place: the place of the tensor's first entry, position << 32; a part of a tensor, with flat indices of
        its own, has a place further on. best_score, best_place (place + flat index) and best_grad hold
        candidates: the best k entries of all tensors so far are among them, in any order, with ties to the
        lowest place; an empty slot holds 0, -1, 0. Scores are those of `d3_score` (of eps, exp), or score
        unless it is None; an active entry is no candidate. With may_hold the candidates may hold entries of
        this tensor already: of two scores of an entry the larger stays, of equal ones the older. k stays the
        same until the candidates are cleared. state: int64, private to the backend, zeros while there are no
        candidates; `candidate_room` says how long state and candidates are. Mutates values, best_score,
        best_place, best_grad and state.""",
    ),
    "union": Op(
        """(Tensor a_offsets, Tensor a_indices, Tensor b_offsets, Tensor b_indices) -> (Tensor, Tensor,
        Tensor, Tensor)""",
        _union,
        """The entries of a (a_offsets, a_indices) and of b (b_offsets, b_indices), with no entry twice.
        Neither has padding. Returns (offsets, indices [n_a + n_b], the places in these indices of a's
        entries, int64 [n_a], and of b's, int64 [n_b]). Mutates nothing.""",
    ),
    "join_": Op(
        """(Tensor(a!)[] arrays, Tensor(b!) offsets, Tensor b_offsets, Tensor b_indices, Tensor?[] b_values)
        -> ()""",
        _no_result,
        """Inserts the entries b (b_offsets, b_indices), none of them held, into a set of entries with
        values. arrays: first the indices of the set, then vectors of one value per entry, each with
        capacity for both sets together; offsets: of the set. b_values: per vector after the indices the
        values of b, or None for zeros. Mutates arrays and offsets.""",
    ),
    "gather": Op(
        "(Tensor[] tensors, Tensor offsets, Tensor indices) -> Tensor",
        lambda tensors, offsets, indices: tensors[0].new_empty(indices.numel()),
        """The values of tensors (M of any strides and of one dtype) at the entries (offsets, indices), in
        entry order, as long as `indices`. Mutates nothing.""",
    ),
    "scatter_": Op(
        "(Tensor(a!)[] tensors, Tensor offsets, Tensor indices, Tensor values) -> ()",
        _no_result,
        """Writes values, in entry order and in the dtype of tensors (M of any strides and of one dtype), to
        the entries (offsets, indices). Mutates tensors at these entries alone.""",
    ),
    "fingerprint": Op(
        "(Tensor[] values, Tensor keys, Tensor offsets, Tensor indices) -> Tensor",
        lambda values, keys, offsets, indices: offsets.new_empty(len(values)),
        """For each vector of values (of 2, 4 or 8 bytes, parallel to `indices`), int64, the sum modulo 2^64
        over the entries (offsets, indices) of mix64(mix64(key + index · INCREMENT) xor bits), in any order,
        as in `docs/delta-format.md`. keys: int64 [M], one per tensor; bits: a value's bit pattern,
        sign-extended; mix64, INCREMENT: those of `hashing.py`. Mutates nothing.""",
    ),
    "squared_norm": Op(
        "(Tensor?[] tensors, Tensor offsets, Tensor indices) -> Tensor",
        lambda tensors, offsets, indices: offsets.new_empty((), dtype=torch.float64),
        """The sum, a float64 scalar, of the squares of tensors (M of any strides and dtypes) at the entries
        (offsets, indices), which may be an active set; the entries of a tensor that is None count as
        zeros. The bits are the same in every order and grouping of the entries, number of threads and
        backend. A NaN at an entry makes the sum NaN, else an infinity makes it infinite;
        `csrc/formulas/norm.h` says how it is summed, and the error bound. Mutates nothing.""",
    ),
    "sampled_weight_grad_": Op(
        """(Tensor left, Tensor right, Tensor offsets, Tensor indices, Tensor(a!) values, bool add) -> ()""",
        _no_result,
        """The gradient of one weight at its active entries alone: a sampled dense-dense product. left:
        [T, rows], right: [T, columns], of one dtype and any strides, T >= 0 tokens; the weight has the shape
        [rows, columns]. Of `torch.nn.Linear` left is the gradient of the output and right the input; of a
        weight stored transposed, as Conv1D's is, left is the input and right the gradient. offsets [2] or
        [R, 2], indices: the active set of the weight. values (parallel to indices, float32, float64 for
        float64) become Σ_t left[t, i] · right[t, j] at index = i · columns + j, or grow by it with add: the
        sum is added to the old value last. Where right is a copy of some columns of the input, the caller
        numbers the indices anew for a weight of so many columns, which keeps their order.
        `csrc/formulas/sampled.h` says in which order products are summed, and the error bound; each
        operation is rounded once. The bits of an entry depend on its two columns alone: not on the other
        entries, on runs, on which columns were copied, on strides, the number of threads or the backend.
        Mutates values.""",
    ),
    "sampled_embedding_grad_": Op(
        """(Tensor grad, Tensor ids, Tensor offsets, Tensor indices, Tensor(a!) values, bool add) -> ()""",
        _no_result,
        """The gradient of one embedding at its active entries alone. grad: [T, columns], the gradient of the
        output, any strides. ids: int64 [T], the row that each token reads; a row that is none of the
        embedding's, such as -1, leaves its token out (padding_idx). offsets [2] or [R, 2], indices: the
        active set of the embedding. values (parallel to indices, float32, float64 for float64) become the
        sum of grad[t, j] over the tokens with id i at index = i · columns + j, or grow by it with add: the
        sum is added to the old value last. A sum begins with zero and takes the tokens in ascending order,
        each step rounded once, as torch's dense gradient on the CPU in float32 does; the bits depend on
        nothing else. Mutates values.""",
    ),
    "adamw_": Op(
        "(Tensor(a!)[] params, Tensor?[] grads, " + _ADAMW_SCHEMA,
        _no_result,
        """One AdamW step at the entries (offsets, indices). params, grads: M tensors as for `select_topk`;
        the entries of a tensor whose grad is None do not change. """
        + _ADAMW_CONTRACT,
    ),
    "adamw_compact_": Op(
        "(Tensor(a!)[] params, Tensor values, " + _ADAMW_SCHEMA,
        _no_result,
        """One AdamW step at the entries (offsets, indices) with gathered gradients. params: M tensors.
        values: the gradients at the entries, parallel to `indices`, float32 or the params' dtype (float64
        for float64). """
        + _ADAMW_CONTRACT,
    ),
}


def _on_gpu(name: str) -> Callable:
    """Op `name` by CUDA or Triton, imported at the first call, so that importing id3_kernels stays light."""

    def call(*args):
        kernels = reference if _has_float64(args) else for_gpu()
        return getattr(kernels, name)(*args)

    return call


def _has_float64(args: tuple) -> bool:
    """Whether the tensors of the op are float64, which the GPU kernels leave to the reference."""
    tensors = [t for arg in args[:2] for t in (arg if isinstance(arg, list | tuple) else [arg])]
    return any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)


_library = torch.library.Library("id3", "DEF")  # lives as long as the module: dropping it unregisters the ops
_cuda_library = torch.library.Library("id3_cuda", "DEF")  # implemented by csrc/cuda, called by cuda.py
_has_gpu_kernels = any(map(importlib.util.find_spec, ("triton", "id3_kernels._cuda")))
for _name, _op in OPS.items():
    _schema = _name + " ".join(_op.schema.split())  # torch's parser takes no line breaks
    _library.define(_schema)
    _cuda_library.define(_schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    if _has_gpu_kernels:
        _library.impl(_name, _on_gpu(_name), "CUDA")
    torch.library.register_fake(f"id3::{_name}", _op.fake, lib=_library)
backend.native()  # registers the C++ kernels

_DISPATCHED = SimpleNamespace(**{name: getattr(torch.ops.id3, name).default for name in OPS})


def kernels_for(device: torch.device, name: str | None) -> ModuleType | SimpleNamespace:
    """The ops of backend `name`, as attributes, for tensors on `device`.

    With None, torch's dispatcher chooses by the tensors: C++ on the CPU and CUDA on a GPU where these
    extensions are built, Triton on a GPU where it is installed, and the reference everywhere else.
    Raises ValueError where the backend cannot run on `device`.
    """
    if name is None:
        return _DISPATCHED
    backend.require(name)
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if name == "cpu" and device.type not in ("cpu", "meta"):
        raise ValueError(f"backend: expected one for tensors on {device}, got 'cpu', which needs CPU tensors")
    if name == "triton" and device.type == "cpu" and not interpreted:
        raise ValueError(
            f"backend: expected one for tensors on {device}, got 'triton', which needs GPU tensors "
            "(or TRITON_INTERPRET=1)"
        )
    if name == "cuda" and device.type != "cuda":
        raise ValueError(
            f"backend: expected one for tensors on {device}, got 'cuda', which needs GPU tensors"
        )
    return _DISPATCHED if name == "cpu" else _module(name)


@functools.cache
def for_gpu() -> ModuleType:
    """The backend that torch's dispatcher uses for GPU tensors: CUDA where it can run, else Triton."""
    return _module("triton" if backend.why_not("cuda") else "cuda")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"id3_kernels.{name}")


def candidate_room(device: torch.device, name: str | None, k: int) -> tuple[int, int]:
    """(candidates, length of `state`) that `collect_` needs to hold the best k entries of all tensors."""
    if name is None and device.type == "cuda":
        module = for_gpu()
    else:
        module = _module("reference" if name in (None, "cpu") else name)
    return module.candidate_room(k) if hasattr(module, "candidate_room") else (k, 0)

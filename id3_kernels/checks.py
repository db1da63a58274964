"""Checks of arguments. Each error is one line: the argument, the expected value, the value received."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .entries import Entries

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def params(tensors: Sequence[Tensor], name: str = "params") -> torch.device:
    """Checks a list of plain floating-point tensors on one device, and returns the device."""
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    for j, t in enumerate(tensors):
        plain(f"{name}[{j}]", t)
        if t.device != tensors[0].device:
            raise ValueError(f"{name}[{j}]: expected a tensor on {tensors[0].device}, got {t.device}")
        if (t.dtype == torch.float64) != (tensors[0].dtype == torch.float64):
            expected = "no float64" if t.dtype == torch.float64 else "float64"
            raise ValueError(
                f"{name}[{j}]: expected {expected} beside {tensors[0].dtype} in {name}[0], got {t.dtype}"
            )
    return tensors[0].device


def plain(name: str, tensor: Tensor) -> None:
    """Checks one dense floating-point tensor of fewer than 2^31 entries."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if type(tensor) not in (Tensor, torch.nn.Parameter) and not _is_fake(tensor):
        raise ValueError(f"{name}: expected a plain tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.numel() >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2^31 entries, got {tensor.numel()}")


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def grads(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
    """Checks a list of gradients (None allowed) against their parameters."""
    if len(gradients) != len(parameters):
        raise ValueError(f"grads: expected {len(parameters)} gradients, got {len(gradients)}")
    for j, (g, p) in enumerate(zip(gradients, parameters, strict=True)):
        if g is not None:
            gradient(f"grads[{j}]", g, p)


def gradient(name: str, g: Tensor, p: Tensor) -> None:
    """Checks one gradient against its parameter: layout, shape, dtype, device."""
    plain(name, g)
    if g.shape != p.shape:
        raise ValueError(f"{name}: expected shape {tuple(p.shape)}, got {tuple(g.shape)}")
    if g.dtype != p.dtype and not (g.dtype == torch.float32 and p.dtype in LOW_PRECISION):
        raise ValueError(f"{name}: expected {p.dtype} as its parameter, got {g.dtype}")
    if g.device != p.device:
        raise ValueError(f"{name}: expected a tensor on {p.device}, got {g.device}")


def matrix(name: str, t: Tensor) -> None:
    """Checks a plain matrix, one row per token."""
    plain(name, t)
    if t.dim() != 2:
        raise ValueError(f"{name}: expected a matrix [tokens, columns], got shape {tuple(t.shape)}")


def factors(left: Tensor, right: Tensor) -> None:
    """Checks the two factors of a weight's gradient."""
    matrix("left", left)
    matrix("right", right)
    if right.dtype != left.dtype:
        raise ValueError(f"right: expected {left.dtype} as left, got {right.dtype}")
    if right.device != left.device:
        raise ValueError(f"right: expected a tensor on {left.device}, got {right.device}")
    if right.shape[0] != left.shape[0]:
        raise ValueError(f"right: expected {left.shape[0]} tokens as left, got {right.shape[0]}")
    if left.shape[1] * right.shape[1] >= 2**31:
        size = left.shape[1] * right.shape[1]
        raise ValueError(f"right: expected a weight of fewer than 2^31 entries, got {size}")


def vector(name: str, t: Tensor, dtype: torch.dtype, length: int, device: torch.device) -> None:
    """Checks a contiguous 1-D tensor of at least `length` elements."""
    if not isinstance(t, Tensor) or t.dtype != dtype or t.dim() != 1 or t.numel() < length:
        got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{name}: expected {dtype} of shape ({length},), got {got}")
    if t.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {t.device}")
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")


def entries(name: str, e: Entries, sizes: Sequence[int] | None, device: torch.device) -> None:
    """Checks offsets and indices; with `sizes` (entries per tensor) the range of each index too."""
    n_tensors = e.offsets.numel() - 1 if sizes is None else len(sizes)
    vector(f"{name}.offsets", e.offsets, torch.int64, n_tensors + 1, device)
    if e.offsets.numel() != n_tensors + 1:
        raise ValueError(f"{name}.offsets: expected {n_tensors + 1} offsets, got {e.offsets.numel()}")
    vector(f"{name}.indices", e.indices, torch.int32, 0, device)
    if not torch.compiler.is_compiling():
        _entry_values(name, e, sizes)


def _entry_values(name: str, e: Entries, sizes: Sequence[int] | None) -> None:
    bounds = e.offsets.tolist()
    if bounds[0] != 0 or any(b > c for b, c in pairwise(bounds)):
        raise ValueError(f"{name}.offsets: expected a first offset of 0 and no decrease, got {bounds[:8]}")
    if bounds[-1] > e.indices.numel():
        raise ValueError(f"{name}.indices: expected {bounds[-1]} indices, got {e.indices.numel()}")
    held = e.indices[: bounds[-1]]
    falls = ((held[1:] <= held[:-1]).nonzero().flatten() + 1).tolist()
    starts = set(bounds)
    for i in falls:
        if i not in starts:
            pair = held[i - 1 : i + 1].tolist()
            raise ValueError(
                f"{name}.indices: expected ascending indices within a tensor, got {pair} at {i - 1}"
            )
    occupied = [j for j, (b, c) in enumerate(pairwise(bounds)) if b < c]
    first = held[[bounds[j] for j in occupied]].tolist() if occupied else []
    last = held[[bounds[j + 1] - 1 for j in occupied]].tolist() if occupied else []
    for j, low, high in zip(occupied, first, last, strict=True):
        if low < 0 or (sizes is not None and high >= sizes[j]):
            raise ValueError(
                f"{name}.indices: expected {_range(sizes and sizes[j])} in tensor {j}, got {low} to {high}"
            )


def _range(size: int | None) -> str:
    if size is None:
        return "at least 0"
    return f"0 to {size - 1}" if size else "no index"


def count(k: int) -> None:
    """Checks a number of entries to select."""
    if isinstance(k, bool) or not isinstance(k, (numbers.Integral, torch.SymInt)) or k < 0:
        raise ValueError(f"k: expected an int of at least 0, got {k!r}")


def d3(eps: float, exp: float) -> None:
    """Checks the numbers of the D3 heuristic (equation 1)."""
    if not eps >= 0 or eps == float("inf"):
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps}")
    if not abs(exp) < float("inf"):
        raise ValueError(f"exp: expected a finite number, got {exp}")
    if exp > 0 and eps == 0:
        raise ValueError(
            f"eps: expected more than 0 with exp > 0, as |g| / |θ|^exp has no value at θ = 0, got {eps}"
        )


def learning_rate(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """(lr, None), or (0, lr) for a one-element tensor on `device`, which the host does not read."""
    if not isinstance(lr, Tensor):
        return float(lr), None
    if lr.numel() != 1 or lr.device != device:
        raise ValueError(f"lr: expected one element on {device}, got {tuple(lr.shape)} on {lr.device}")
    return 0.0, lr


def adamw_numbers(step: int | Tensor, values: Sequence[float]) -> None:
    """Checks step and (lr, beta1, beta2, eps, weight_decay) of an AdamW call."""
    if isinstance(step, int) and step < 1:
        raise ValueError(f"step: expected at least 1 (it counts this step), got {step}")
    for name, beta in zip(("beta1", "beta2"), values[1:3], strict=True):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: expected 0 to below 1, got {beta}")

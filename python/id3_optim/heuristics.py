"""Heuristics score the frozen entries; the entries of largest score join the active set first.

A heuristic is a frozen dataclass or a function `f(param, grad) -> tensor`. `D3` is scored inside the
selection kernels. Every other heuristic gives one score tensor per parameter, by `scores`.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from id3_kernels.hashing import INCREMENT, SLICE, mix64, shifted_right

from .distributed.blocks import Blocks
from .distributed.part import block_of, is_split, like, local, part_of
from .pieces import Rows, rows_of


def _number(name: str, value: float, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def _float32(value: float) -> float:
    """The value that the kernels read: rounded to float32, ±inf beyond its range."""
    return torch.tensor(value, dtype=torch.float64, device="cpu").float().item()


@dataclass(frozen=True)
class D3:
    """The paper's heuristic, eq. 1: |g| / (|θ| + eps)^exp. Theorem 1 holds for eps ≥ 1 and exp ≥ 0.

    Raises ValueError for a negative or non-finite eps or exp, and for eps ≤ 0 with exp > 0,
    where every zero weight would score infinity.
    """

    eps: float = 1.0
    exp: float = 2.0

    def __post_init__(self) -> None:
        eps = _number("eps", self.eps, "a finite number >= 0")
        exp = _number("exp", self.exp, "a finite number")
        if not math.isfinite(exp):
            raise ValueError(f"exp: expected a finite number (the limit +inf is Magnitude()), got {exp}")
        if not 0.0 <= _float32(eps) < math.inf:
            raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
        if exp > 0 and _float32(eps) == 0.0:
            raise ValueError(f"eps: expected > 0 (in float32) with exp = {exp} > 0, got {eps}")
        object.__setattr__(self, "eps", eps)
        object.__setattr__(self, "exp", exp)


@dataclass(frozen=True)
class Magnitude:
    """PaFi: the smallest |θ| first, zeros before all; values of 2^127 (float64: 2^1023) and more tie."""


@dataclass(frozen=True, eq=False)
class Fisher:
    """Fish mask: precomputed scores, such as those of `fisher_scores`.

    scores: a mapping from parameter name to a tensor of that parameter's shape (needs an optimizer built from
    `named_parameters()`), or a sequence of such tensors in the order of the optimizer's parameters. A resumed
    run and the other ranks need the same ones; this is checked, except of DTensors.
    """

    scores: Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class Random:
    """A random mask: scores are a hash of seed, position and flat index, the same on all devices."""

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral):
            raise TypeError(f"seed: expected an int, got {self.seed!r}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected a 64-bit signed integer, got {self.seed}")
        object.__setattr__(self, "seed", int(self.seed))


@dataclass(frozen=True)
class Bias:
    """BitFit: the parameters whose name ends in `bias`; all their entries score 1. Needs named parameters."""


Heuristic = D3 | Magnitude | Fisher | Random | Bias | Callable[[Tensor, Tensor], Tensor]


def snip(param: Tensor, grad: Tensor) -> Tensor:
    """SNIP's saliency |θ·g| (Lee et al., 2019): how much the loss would change without the entry."""
    dtype = _score_dtype(param)
    return (param.to(dtype) * grad.to(dtype)).abs()


def largest(param: Tensor, grad: Tensor) -> Tensor:
    """|θ|: the largest weights first, the reverse of `Magnitude`."""
    return param.to(_score_dtype(param)).abs()


def scores(
    heuristic: Heuristic,
    param: Tensor,
    grad: Tensor | None,
    position: int,
    name: str | None,
    owner: Tensor | None = None,
    rows: Rows | None = None,
) -> Tensor | None:
    """One parameter's scores by any heuristic except D3.

    Larger scores join first; only finite normal numbers > 0 are selected.
    position: the parameter's number in the order of the param groups. name: its name, None where unknown.
    owner: the DTensor of which param and grad are what this rank holds; a function gets it and its gradient.
    With `rows` the tensor of which they are that piece, which no function can score.
    Returns a tensor of the parameter's shape on its device, float32 (float64 for float64 parameters),
    or None where no entry of this parameter can be selected (no gradient; not a bias). Mutates nothing.
    Raises ValueError or TypeError, with the heuristic's name, where it does not fit the parameter.
    """
    if grad is None:
        return None
    owner = param if owner is None else owner
    with torch.no_grad():
        match heuristic:
            case Magnitude():
                return _magnitude_scores(param)
            case Random(seed):
                begin = 0 if rows is None else rows.bounds(owner.shape)[0]
                return _random_scores(seed, position, param, owner, begin)
            case Bias():
                return _bias_scores(param, name)
            case Fisher(given):
                return rows_of(_fisher_scores_of(given, owner, position, name), rows)
            case D3():
                raise TypeError(
                    "scores: expected a heuristic other than D3, got D3; use id3_kernels.d3_score"
                )
        given = heuristic(owner, grad if owner is param else owner.grad)
        return _held(_checked(_title(heuristic), given, owner), owner)


def describe(heuristic: Heuristic) -> dict[str, Any]:
    """The heuristic's name and numbers as plain values; equal dicts mean equal heuristics on resume.

    A function is described by its qualified name, and by what its own `describe()` returns if it has one;
    `Fisher` by a checksum of its scores, which reads all of them, or by their own `describe()`.
    Raises TypeError for a value that is not a heuristic.
    """
    match heuristic:
        case D3(eps, exp):
            return {"name": "d3", "eps": eps, "exp": exp}
        case Magnitude():
            return {"name": "magnitude"}
        case Random(seed):
            return {"name": "random", "seed": seed}
        case Bias():
            return {"name": "bias"}
        case Fisher(given):
            if hasattr(given, "describe"):
                return {"name": "fisher", **given.describe()}
            tensors = list(given.values()) if isinstance(given, Mapping) else list(given)
            return {"name": "fisher", "tensors": len(tensors), "checksum": sum(map(_checksum, tensors))}
    if isinstance(heuristic, type) or not callable(heuristic):
        kinds = "D3(), Magnitude(), Fisher(), Random(), Bias() or a function f(param, grad) -> tensor"
        raise TypeError(f"heuristic: expected {kinds}, got {heuristic!r}")
    own = heuristic.describe() if hasattr(heuristic, "describe") else {}
    return {"name": _title(heuristic), **own}


def _score_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _title(function: Callable) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _checksum(scores: Tensor) -> int:
    """An integer sum of bit patterns, which unlike a float sum is the same for every thread count. 0 of split
    scores, of which each rank has other ones."""
    if is_split(scores):
        return 0
    bits = scores.double().contiguous().view(torch.int64)
    return bits.sum().item()


def _magnitude_scores(param: Tensor) -> Tensor:
    """Scores in the reverse order of |θ|, exactly: positive floats sort as their bit patterns do."""
    wide = param.abs().to(_score_dtype(param)).contiguous()
    if wide.dtype == torch.float32:
        integer, largest, smallest_normal = torch.int32, 0x7F7FFFFF, 0x00800000
    else:
        integer, largest, smallest_normal = torch.int64, 0x7FEFFFFFFFFFFFFF, 0x0010000000000000
    bits = largest - wide.view(integer)
    not_finite = bits < 0
    # There are 2^23 (2^52) more finite patterns than normal ones, so that the largest |θ| share the lowest
    # score.
    return bits.clamp_(min=smallest_normal).masked_fill_(not_finite, 0).view(wide.dtype)


def _bias_scores(param: Tensor, name: str | None) -> Tensor | None:
    if name is None:
        raise ValueError(
            "heuristic Bias: expected named parameters, got no name; use model.named_parameters()"
        )
    if not name.endswith("bias"):
        return None
    return torch.ones(param.shape, dtype=_score_dtype(param), device=param.device)


def _fisher_scores_of(
    given: Mapping[str, Tensor] | Sequence[Tensor], param: Tensor, position: int, name: str | None
) -> Tensor:
    if isinstance(given, Mapping):
        if name is None:
            raise ValueError(
                "heuristic Fisher: expected named parameters for scores by name, got no name; "
                "use model.named_parameters()"
            )
        if name not in given:
            raise ValueError(f"heuristic Fisher: expected scores for {name!r}, got none")
        score = given[name]
    else:
        if position >= len(given):
            raise ValueError(
                f"heuristic Fisher: expected scores for parameter {position}, got {len(given)} tensors"
            )
        score = given[position]
    return _held(_checked("Fisher", score, param), param).to(param.device, _score_dtype(param))


def _held(score: Tensor, owner: Tensor) -> Tensor:
    """The part of the scores that belongs to what this rank holds of the parameter."""
    return local(like(score, owner)) if is_split(score) else block_of(score, owner)


def _checked(title: str, score: Tensor, param: Tensor) -> Tensor:
    if not isinstance(score, Tensor):
        raise TypeError(f"heuristic {title}: expected a tensor, got {type(score).__name__}")
    if score.shape != param.shape:
        raise ValueError(f"heuristic {title}: expected shape {tuple(param.shape)}, got {tuple(score.shape)}")
    if score.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"heuristic {title}: expected float32 or float64 scores, got {score.dtype}")
    return score.to(_score_dtype(param))


def _random_key(seed: int, position: int) -> int:
    seed_bits, tensor_bits = torch.tensor([seed, position], dtype=torch.int64, device="cpu")
    return mix64(mix64(seed_bits + INCREMENT) + tensor_bits * INCREMENT).item()


def _random_scores(seed: int, position: int, param: Tensor, owner: Tensor, begin: int) -> Tensor:
    """The top 31 bits of hash(seed, position, flat index), scaled to the bit patterns of normal floats.

    begin: the flat index in owner where param begins, if it is a piece.
    """
    key, size, device = _random_key(seed, position), param.numel(), param.device
    # Its tables come from the host, so they are made for a DTensor alone.
    blocks = Blocks([part_of(owner)], [True], device) if is_split(owner) else None
    out = torch.empty(size, dtype=torch.float32, device=device)
    for start in range(0, size, SLICE):
        index = torch.arange(start, min(start + SLICE, size), dtype=torch.int64, device=device)
        index = begin + (blocks.whole_index(torch.zeros_like(index), index) if blocks else index)
        uniform = shifted_right(mix64(index * INCREMENT + key), 33)
        patterns = ((uniform * 0x7F000000) >> 31) + 0x00800000
        out[start : start + SLICE] = patterns.to(torch.int32).view(torch.float32)
    return out.view(param.shape).to(_score_dtype(param))

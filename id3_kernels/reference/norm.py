"""The sum of squares at entries, the same bits in any order: `csrc/formulas/norm.h` has the error bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..entries import Entries, runs
from .entries import read


def squared_norm(tensors, offsets, indices):
    values = [torch.zeros(1, dtype=torch.float64, device=indices.device)]
    for run in runs(offsets):
        rows = zip(tensors, Entries(run, indices).lists(), strict=True)
        values += [read(t, i).double() for t, i in rows if t is not None]
    values = torch.cat(values).abs()
    largest = values.max()  # NaN where there is one
    scale = norm_scale(largest)
    high, low = square_units(torch.where(largest.isfinite(), values, 0) / scale)
    return norm_total(largest, high.sum(), low.sum(), scale)


def norm_scale(largest: Tensor) -> Tensor:
    """The largest power of two up to `largest` (float64), at least 2^-1022."""
    power = (largest.view(torch.int64) & (0x7FF << 52)).view(torch.float64)
    return power.clamp(min=torch.finfo(torch.float64).tiny)


def square_units(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """int64: the squares of numbers below 2 in units of 2^-29, and the remainders in units of 2^-60.

    The sum of integers depends on no order, so the bits of the norm do not either.
    """
    units = scaled * scaled * 2.0**29
    high = units.to(torch.int64)
    return high, ((units - high) * 2.0**31).to(torch.int64)


def norm_total(largest: Tensor, high: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """The sum of squares; NaN where a value is NaN, else infinite where one is."""
    total = (high.double() + low.double() * 2.0**-31) * 2.0**-29 * scale * scale
    return torch.where(largest.isfinite(), total, torch.where(largest.isnan(), math.nan, math.inf))

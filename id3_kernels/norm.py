"""The sum of squares by integers: `csrc/formulas/norm.h` in torch, which synchronises with no device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def norm_scale(largest: Tensor) -> Tensor:
    """The largest power of two up to `largest` (float64), at least 2^-1022."""
    power = (largest.view(torch.int64) & (0x7FF << 52)).view(torch.float64)
    return power.clamp(min=torch.finfo(torch.float64).tiny)


def square_units(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """int64: the squares of numbers below 2 in units of 2^-29, and what is left in units of 2^-60.

    The sums of such integers depend on no order, and so neither do the bits of the norm: `formulas/norm.h`
    has the error bound.
    """
    units = scaled * scaled * 2.0**29
    high = units.to(torch.int64)
    return high, ((units - high) * 2.0**31).to(torch.int64)


def norm_total(largest: Tensor, high: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """The sum of squares; NaN where a value is NaN, else infinite where one is."""
    total = (high.double() + low.double() * 2.0**-31) * 2.0**-29 * scale * scale
    return torch.where(largest.isfinite(), total, torch.where(largest.isnan(), math.nan, math.inf))

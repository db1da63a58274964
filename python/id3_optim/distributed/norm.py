"""Sums of squares over ranks, with the bits that one process finds whatever the ranks hold."""

from __future__ import annotations

import torch
from torch import Tensor

from id3_kernels.reference.norm import norm_scale, norm_total, square_units

from .many_ranks import ManyRanks


def sums_of_squares(ranks: ManyRanks, values: list[Tensor]) -> list[Tensor]:
    """float64 [] for each tensor of values, of which every rank gives its own, each number on one rank alone.

    As `squared_norm` of the kernels: integers are added, in units of the largest number of all ranks.
    """
    if not values:
        return []
    home = values[0].device
    wide = [v.double().abs() for v in values]
    largest = torch.stack([v.max().to(home) if v.numel() else v.new_zeros((), device=home) for v in wide])
    largest = ranks.rows(largest, "the norm of the gradients").amax(0)  # NaN where there is one
    scale = norm_scale(largest)
    sums = []
    for v, most, unit in zip(wide, largest, scale, strict=True):
        finite = torch.where(most.to(v.device).isfinite(), v, 0)
        sums += [units.sum().to(home) for units in square_units(finite / unit.to(v.device))]
    high, low = ranks.total(torch.stack(sums), "the norm of the gradients").view(-1, 2).unbind(1)
    return list(norm_total(largest, high, low, scale))

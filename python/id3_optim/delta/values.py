"""The values of a delta: whether they are finite, and the same values in another dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .file import Change, DeltaError


def nonfinite(changes: Mapping[str, Change]) -> dict[str, int]:
    """Parameter name → how many of its values are NaN or infinite, for parameters with any."""
    bad = {name: c.values.numel() - int(c.values.isfinite().count_nonzero()) for name, c in changes.items()}
    return {name: count for name, count in bad.items() if count}


def check_finite(changes: Mapping[str, Change], where: str = "") -> None:
    """Raises DeltaError, which begins with `where`, for values that are NaN or infinite."""
    counts = nonfinite(changes)
    if not counts:
        return
    name = next(iter(counts))
    indices, values = changes[name].indices, changes[name].values.reshape(-1)
    at = int((~values.isfinite()).nonzero()[0])
    index = at if indices is None else int(indices[at])
    raise DeltaError(f"{where}{name}: expected finite values, got {values[at].item()} at index {index} "
                     f"({sum(counts.values()):,} such values in all, as after a run that diverged); "
                     "allow_nonfinite=True takes them")  # fmt: skip


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in another floating-point dtype, to nearest even, rounded once.

    torch converts float64 to 16 bits through float32, which would round twice. Rounding to odd in float32
    makes the second rounding equal to that of the exact number.
    """
    if dtype.itemsize > 2 or values.dtype != torch.float64:
        return values.to(dtype)
    narrow = values.float()
    inexact = (narrow.double() != values) & ~values.isnan()
    away = narrow.double().abs() > values.abs()
    odd = (narrow.view(torch.int32) - away.int()) | 1
    return torch.where(inexact, odd.view(torch.float32), narrow).to(dtype)

"""Entries and values as torch's own sparse COO tensors, one per parameter, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .entries import Entries


@torch.no_grad()
def to_sparse_coo(
    entries: Entries, values: Tensor, shapes: Sequence[torch.Size | tuple[int, ...]]
) -> list[Tensor]:
    """One coalesced sparse COO tensor per shape, holding `values` [n] at `entries`.

    Mutates nothing; synchronises on a GPU. Raises ValueError if entries or values do not fit the shapes.
    """
    device = entries.offsets.device
    checks.entries("entries", entries, [math.prod(shape) for shape in shapes], device)
    checks.vector("values", values, values.dtype, int(entries.offsets[-1]), device)
    bounds = entries.offsets.tolist()
    tensors = []
    for j, (index, shape) in enumerate(zip(entries.lists(), shapes, strict=True)):
        flat = index.to(torch.int64)
        coordinates = (
            torch.stack(torch.unravel_index(flat, tuple(shape)))
            if len(shape)
            else flat.new_empty(0, flat.numel())
        )
        own = values[bounds[j] : bounds[j + 1]]
        tensors.append(
            torch.sparse_coo_tensor(coordinates, own, tuple(shape), is_coalesced=True, check_invariants=True)
        )
    return tensors


@torch.no_grad()
def from_sparse_coo(tensors: Sequence[Tensor]) -> tuple[Entries, Tensor]:
    """(Entries, values [n]) of sparse COO tensors (coalesced first if necessary), all of one dtype.

    Mutates nothing; synchronises on a GPU. Raises ValueError for other layouts and for dense dimensions:
    their elements are not entries.
    """
    rows, values = [], []
    for j, t in enumerate(tensors):
        if t.layout != torch.sparse_coo or t.dense_dim() != 0:
            raise ValueError(
                f"tensors[{j}]: expected sparse COO without dense dimensions, got {t.layout} with "
                f"{t.dense_dim() if t.layout == torch.sparse_coo else 'no'} dense dimensions"
            )
        if t.numel() >= 2**31:
            raise ValueError(f"tensors[{j}]: expected fewer than 2^31 entries, got {t.numel()}")
        if t.dtype != tensors[0].dtype:
            raise ValueError(f"tensors[{j}]: expected {tensors[0].dtype} as tensors[0], got {t.dtype}")
        t = t.coalesce()
        coordinates, flat = t.indices(), torch.zeros_like(t.values(), dtype=torch.int64)
        for axis, size in enumerate(t.shape):
            flat = flat * size + coordinates[axis]
        rows.append(flat)
        values.append(t.values())
    if not tensors:
        raise ValueError("tensors: expected at least one tensor, got none")
    return Entries.from_lists(rows, tensors[0].device), torch.cat(values)

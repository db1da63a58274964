"""Values at flat indices, by parameter name: the union of two sets of entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import id3_kernels
from id3_kernels import Entries

from .fingerprint import by_kind


class Row(NamedTuple):
    """Entries of one parameter: indices int32 [n], flat and ascending; values [n] of its dtype."""

    indices: Tensor
    values: Tensor


Rows = dict[str, Row]


def joined(first: Mapping[str, Row], second: Mapping[str, Row]) -> Rows:
    """All entries of both sides, with the values of `first` where both have one."""
    if not first or not second:
        return dict(first or second)
    names = list(dict.fromkeys([*first, *second]))
    found: Rows = {}
    for members in by_kind([first.get(name, second.get(name)).values for name in names]):
        kind = [names[i] for i in members]
        values = first.get(kind[0], second.get(kind[0])).values
        rows = [[side.get(name, _empty(values)) for name in kind] for side in (first, second)]
        sides = [Entries.from_lists([row.indices for row in side], values.device) for side in rows]
        union, *places = id3_kernels.union(*sides)
        every = values.new_empty(union.indices.numel())
        for side, at in reversed(list(zip(rows, places, strict=True))):
            every[at.long()] = torch.cat([row.values for row in side])
        counts = union.offsets.diff().tolist()
        parts = zip(union.indices.split(counts), every.split(counts), strict=True)
        found |= {name: Row(*part) for name, part in zip(kind, parts, strict=True)}
    return found


def _empty(values: Tensor) -> Row:
    return Row(torch.empty(0, dtype=torch.int32, device=values.device), values[:0])

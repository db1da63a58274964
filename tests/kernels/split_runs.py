"""One set of entries as several runs with junk between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from id3_kernels import Entries

JUNK = -77  # as an index outside every tensor


class Runs(NamedTuple):
    """offsets [R, M + 1], the rows of a wider tensor; indices; at: where each entry of the set stands."""

    offsets: Tensor
    indices: Tensor
    at: Tensor

    def spread(self, values: Tensor | None, junk: float) -> Tensor | None:
        """Values in the order of the set, put beside the indices; junk in between."""
        if values is None:
            return None
        out = torch.full(self.indices.shape, junk, dtype=values.dtype)
        out[self.at] = values[: len(self.at)]
        return out

    def between(self) -> Tensor:
        """bool: where no entry stands."""
        out = torch.ones(self.indices.shape, dtype=torch.bool)
        out[self.at] = False
        return out


def split(entries: Entries, count: int, rng: np.random.Generator) -> Runs:
    """Every entry goes to one of `count` runs, some of which may stay empty."""
    rows = entries.lists()
    n, run_of = sum(map(len, rows)), rng.integers(0, count, sum(map(len, rows)))
    if rng.random() < 0.2:
        run_of[:] = count - 1
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    begin = np.cumsum([rng.integers(0, 4), *(sum(run_of == r) + rng.integers(0, 4) for r in range(count))])
    indices = torch.full((int(begin[-1]),), JUNK, dtype=torch.int32)
    wide = torch.full((count, len(rows) + 6), JUNK)
    offsets = wide[:, 3 : 4 + len(rows)]
    at = torch.zeros(n, dtype=torch.int64)
    for r in range(count):
        mine = np.flatnonzero(run_of == r)
        at[mine] = torch.from_numpy(begin[r] + np.arange(len(mine)))
        counts = np.bincount(owner[mine], minlength=len(rows))
        offsets[r] = torch.from_numpy(begin[r] + np.concatenate([[0], counts.cumsum()]))
    indices[at] = entries.indices[:n]
    return Runs(offsets, indices, at)

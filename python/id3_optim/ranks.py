"""What one rank has to learn from the other ranks. One process holds every entry, so it answers alone.

Selection, the count of active entries, clipping, checkpoints and deltas go through this module, so that
parameters sharded over ranks have one place to begin. Released gradients refuse several processes.
"""

from __future__ import annotations

import torch
from torch import Tensor


class OneProcess:
    """The answers of a run in which every rank holds every entry and sees the same gradients."""

    alone = True  # `gather` and `total` return what they are given

    def gather(self, place: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates of all ranks, in rank order: place int64 [n] (position << 32 | index), score [n]."""
        return place, score

    def total(self, number: Tensor) -> Tensor:
        """The sum over ranks of a count (int64) or a squared norm (float64): the same bits on each rank."""
        return number

    def whole(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """One parameter's entries from all ranks: `indices` into the unsharded tensor, ascending, and the
        columns beside them."""
        return entries


def writes_files() -> bool:
    """Whether this rank writes the files of the run: of several processes the first does."""
    return not _distributed() or torch.distributed.get_rank() == 0


def world_size() -> int:
    """The number of processes of the default group, 1 where there is none."""
    return torch.distributed.get_world_size() if _distributed() else 1


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

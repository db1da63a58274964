"""The values that the active entries had before training, in the parameters for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from id3_kernels import Entries

from .active_set import ActiveSet


class _Swap(NamedTuple):
    """Entries of one run of a shard, in params without a version counter, and two values of each entry."""

    kernels: Any
    params: list[Tensor]
    entries: Entries
    originals: Tensor
    trained: Tensor

    def write(self, values: Tensor) -> None:
        self.kernels.scatter_(self.params, *self.entries, values)


@contextmanager
def originals_in(active: ActiveSet) -> Iterator[None]:
    """Puts the originals into the parameters and afterwards the values that these held, bit for bit.

    O(entries); does not synchronise with a GPU. The version counters of the parameters stay, since autograd
    would refuse the backward pass of what was computed before the block, whose weights are back by then.
    """
    swaps = list(_swaps(active))
    try:
        for swap in swaps:
            swap.write(swap.originals)
        yield
    finally:
        for swap in swaps:
            swap.write(swap.trained)


def _swaps(active: ActiveSet) -> Iterator[_Swap]:
    for i, shard in enumerate(active.shards):
        if shard.split:
            shard.renew()
        params = [p.data for p in shard.params]
        if active.layout.repeat:
            runs = [(active.ever[i].entries, active.ever[i].originals)]
        else:
            runs = list(zip(shard.runs(), shard.by_run("originals"), strict=True))
        for entries, originals in runs:
            trained = shard.kernels.gather(params, *entries)
            yield _Swap(shard.kernels, params, entries, originals, trained)

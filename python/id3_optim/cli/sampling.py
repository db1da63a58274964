"""The order of training rows under `--group-by-length`."""

from collections.abc import Iterator, Sequence

import torch
import transformers
from torch.utils.data import Sampler

_POOL = 50  # batches, sorted by length together


def grouped_by_length(lengths: Sequence[int], batch: int, generator: torch.Generator) -> list[int]:
    """Indices of all rows, so that each `batch` of them has similar lengths; an incomplete one is last.

    Rows are sorted within random pools alone, and the batches shuffled: a run shall not see long texts first.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(order) // batch * batch
    rest, pool = order[whole:], _POOL * batch
    pools = (sorted(order[i : min(i + pool, whole)], key=lengths.__getitem__) for i in range(0, whole, pool))
    batches = [rows[i : i + batch] for rows in pools for i in range(0, len(rows), batch)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [row for i in shuffled for row in batches[i]] + rest


class GroupedByLength(Sampler[int]):
    """`grouped_by_length` anew in each epoch, from seed + epoch, as torch's DistributedSampler has it.

    transformers' `LengthGroupedSampler` draws from the global generator, whose state depends on a method's
    random mask and on a resume, and begins each pool with its longest texts.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(grouped_by_length(self.lengths, self.batch, generator))


class EachEpoch(transformers.TrainerCallback):
    """Tells the sampler the epoch: accelerate does not reach it where several processes resume."""

    def __init__(self, sampler: GroupedByLength) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._sampler.set_epoch(int(state.epoch or 0))

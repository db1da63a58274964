"""The Trainer of `id3-optim train`."""

from __future__ import annotations

import transformers

from ..integrations.data_parallel import SparseDataParallel
from .divergence import FiniteLoss
from .sampling import EachEpoch, GroupedByLength


class WatchedTrainer(transformers.Trainer):
    """A Trainer that shows the loss of every batch to a `FiniteLoss`. grouped: rows of similar length share a
    batch, and the batches of all processes in one step."""

    def __init__(self, watch: FiniteLoss, grouped: bool = False, **options) -> None:
        super().__init__(**options)
        self.watch, self._grouped = watch, None
        self.notes: list[str] = []  # what is to be said before training
        self.also_eval: list[dict] = []  # rows of another file, measured on at the end
        if grouped:
            lengths = [len(row["input_ids"]) for row in self.train_dataset]
            rows = self.args.train_batch_size * self.args.world_size
            self._grouped = GroupedByLength(lengths, rows, self.args.seed)
            self.add_callback(EachEpoch(self._grouped))

    def training_step(self, *args, **kwargs):
        """The Trainer's own step; its loss [] is watched, of several processes the mean on each of them."""
        loss = super().training_step(*args, **kwargs)
        self.watch.see(self.state.global_step + 1, self.accelerator.reduce(loss.detach(), "mean"))
        return loss

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self._grouped is None else self._grouped


class ExchangingTrainer(SparseDataParallel, WatchedTrainer):
    """The same for several processes that send what a step uses."""

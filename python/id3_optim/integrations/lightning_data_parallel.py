"""Lightning's Trainer in several processes that send what a step uses, in place of whole gradients.

    Trainer(strategy=SparseDataParallelStrategy(), devices=8, callbacks=[ID3Callback(sparse_backward=True)])

`docs/distributed.md` says what is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

try:
    from lightning.pytorch.strategies import DDPStrategy
except ModuleNotFoundError:
    from pytorch_lightning.strategies import DDPStrategy

from ..ranks import world_size
from .run import check_averages


class SparseDataParallelStrategy(DDPStrategy):
    """Lightning's DDPStrategy without DistributedDataParallel around the module, in `fit`.

    `configure_optimizers` gives `ID3AdamW(…, process_group=torch.distributed.group.WORLD)`, so that
    `sparse_backward` and released gradients apply. The first process's parameters and buffers are sent to the
    other ones when `fit` begins; later each keeps buffers of its own, such as a BatchNorm's means. With
    `accumulate_grad_batches` the batches of a step add up, and are sent with the last one. In one process
    nothing changes.

    Raises ValueError when `fit` begins, in several processes, for another optimizer, which would train each
    of them alone, and for the Trainer's own clipping.
    """

    def setup(self, trainer: Any) -> None:
        """Lightning's own: the module is moved, and the optimizers are made."""
        super().setup(trainer)
        if world_size() == 1:
            return
        for optimizer in self.optimizers:
            check_averages(optimizer)
        if self.optimizers and trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val: expected none, got {trainer.gradient_clip_val}, by which each process "
                "would clip its own gradients; give max_grad_norm to ID3AdamW"
            )

    def configure_ddp(self) -> None:
        """Makes all processes' modules equal; there is no wrapper that would."""
        if world_size() > 1:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around the batches of a step but the last one."""
        with ExitStack() as stack:
            if world_size() > 1:
                for optimizer in (own for own in self.optimizers if own.select_from != "max"):
                    stack.enter_context(optimizer.no_sync())
            yield

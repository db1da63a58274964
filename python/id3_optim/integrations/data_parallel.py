"""Trainers of transformers and TRL whose processes send what a step uses, in place of whole gradients.

    class MyTrainer(SparseDataParallel, Trainer):
        pass

`docs/distributed.md` says what is sent. FSDP2 is another way to train on several GPUs.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..ranks import world_size
from .run import check_averages


class SparseDataParallel:
    """Stands before a Trainer among the bases of a class; its `ID3AdamW` has all processes' `process_group`.

    The model gets no DistributedDataParallel, so `sparse_backward` and released gradients apply to it. With
    gradient accumulation the batches of a step add up, and are sent with the last one. In one process nothing
    changes.
    Raises TypeError for a class with the Trainer before it, and in a step of several processes ValueError for
    another optimizer, which would train each of them alone, and for the Trainer's own clipping.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(SparseDataParallel):
            raise TypeError(f"{cls.__name__}: expected SparseDataParallel before the Trainer, got it after")

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own."""
        super().create_accelerator_and_postprocess()
        leave_plain(self.accelerator)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's own: forward and backward of one batch."""
        if world_size() == 1:
            return super().training_step(*args, **kwargs)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        _check(optimizer, self.args.max_grad_norm)
        whole = self.accelerator.sync_gradients or optimizer.select_from == "max"
        with nullcontext() if whole else optimizer.no_sync():
            return super().training_step(*args, **kwargs)


def _check(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Raises ValueError for what would part the processes, or differ from one process."""
    check_averages(optimizer)
    if max_grad_norm > 0:
        raise ValueError(
            f"max_grad_norm: expected TrainingArguments(max_grad_norm=0), got {max_grad_norm}, by which each "
            "process would clip its own gradients; give it to ID3AdamW"
        )


def leave_plain(accelerator: Any, **fixed: Any) -> None:
    """Lets an Accelerator put no DistributedDataParallel around models. Mutates it. fixed: arguments of
    `prepare_model`."""
    prepare = accelerator.prepare_model

    def prepare_model(model: nn.Module, *args: Any, **given: Any) -> nn.Module:
        return prepare(model, *args, **given | fixed | {"evaluation_mode": True})

    accelerator.prepare_model = prepare_model

"""Trainers of transformers and TRL whose processes send what a step uses, in place of whole gradients.

    class MyTrainer(SparseDataParallel, Trainer):
        pass

`docs/distributed.md` says what is sent. FSDP2 is another way to train on several GPUs.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from ..optimizer import ID3AdamW
from ..ranks import world_size
from ..wrappers import unwrapped


class SparseDataParallel:
    """Stands before a Trainer among the bases of a class; its `ID3AdamW` has a `process_group`.

    The model gets no DistributedDataParallel, so `sparse_backward` and released gradients apply to it. With
    gradient accumulation the last batch of a step alone is sent. In one process nothing changes.
    A step raises ValueError where several processes have another optimizer, which would train each alone.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own."""
        super().create_accelerator_and_postprocess()
        leave_plain(self.accelerator)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's own: forward and backward of one batch."""
        optimizer = unwrapped(self.optimizer)
        if world_size() > 1 and getattr(optimizer, "replicas", None) is None:
            got = "none" if isinstance(optimizer, ID3AdamW) else type(optimizer).__name__
            raise ValueError(f"optimizer: expected ID3AdamW with a process_group, got {got}")
        with nullcontext() if self.accelerator.sync_gradients else optimizer.no_sync():
            return super().training_step(*args, **kwargs)


def leave_plain(accelerator: Any) -> None:
    """Lets an Accelerator put no DistributedDataParallel around models, nor move them. Mutates it."""
    prepare = accelerator.prepare_model

    def prepare_model(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return prepare(model, device_placement=False, evaluation_mode=True)

    accelerator.prepare_model = prepare_model

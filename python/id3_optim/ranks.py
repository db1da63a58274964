"""The run that needs no other rank, and the trainers whose parts of the parameters cannot be trained.

A DTensor's part can be: `distributed` has what its ranks tell each other.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor


class OneProcess:
    """A run in which every rank holds every entry and sees the same gradients: nothing is to be said.

    `distributed.ManyRanks` stands here where ranks hold parts of the parameters.
    """

    alone = True

    def share(self, flags: list[Tensor]) -> None:
        """Sets each one-element tensor to the largest of all ranks."""


# --- refusals ----------------------------------------------------------------------------------------

_REMEDY = (
    "which is not supported: each rank would select within its own part; use FSDP2 (fully_shard; "
    "fsdp_version: 2 in accelerate) or DistributedDataParallel"
)


def check_whole(name: str, param: Tensor) -> None:
    """Raises ValueError for a parameter of which this rank holds a part that is no DTensor, as its marks say.

    FullyShardedDataParallel marks its flat parameter and, with use_orig_params, the views into it, which it
    puts into parameters that exist when a model is wrapped: check again before the first step.
    """
    splitter = None
    if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
        splitter = "FullyShardedDataParallel (FSDP1)"
    elif hasattr(param, "ds_id"):
        splitter = "DeepSpeed ZeRO"
    if splitter is not None:
        raise ValueError(f"{name}: expected a whole parameter, got one split by {splitter}, {_REMEDY}")


def check_module(name: str) -> None:
    """Raises ValueError where a parameter's name says that FullyShardedDataParallel wraps its module."""
    if "_fsdp_wrapped_module" in name.split("."):
        raise ValueError(
            f"model: expected whole parameters, got one in FullyShardedDataParallel ({name}), {_REMEDY}"
        )


def check_builder() -> None:
    """Raises ValueError where torch's ZeroRedundancyOptimizer builds the optimizer that calls this function.

    It hands each rank its share of the parameters as if these were all. Neither the parameters nor the
    arguments show this, and a comparison of the ranks would wait for ranks that do not build an optimizer:
    what shows it is the method that calls.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if module is not None else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise ValueError(
                "optimizer_class: expected an optimizer that works on some of the parameters, got ID3AdamW, "
                "which chooses among all: drop ZeroRedundancyOptimizer (the state is small) and use "
                "DistributedDataParallel"
            )
        frame = frame.f_back


# --- processes ---------------------------------------------------------------------------------------


def writes_files() -> bool:
    """Whether this rank writes the files of the run: of several processes the first does."""
    return not _distributed() or torch.distributed.get_rank() == 0


def world_size() -> int:
    """The number of processes of the default group, 1 where there is none."""
    return torch.distributed.get_world_size() if _distributed() else 1


def launched() -> tuple[int, int]:
    """(rank, number of processes) by the environment that torchrun makes, (0, 1) where there is none.

    It is known before the processes form a group.
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def meet() -> None:
    """Waits for all processes of the default group, where there is one."""
    if _distributed():
        torch.distributed.barrier()


def largest(flags: Tensor) -> Tensor:
    """The elementwise largest over all processes of the default group. Mutates flags, int32 [n]."""
    if _distributed():
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return flags


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

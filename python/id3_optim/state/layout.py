"""Which arrays the optimizer keeps for its active entries, and how tensors reach another device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from id3_kernels.checks import LOW_PRECISION


@dataclass(frozen=True)
class Layout:
    """Which arrays stand beside the indices and the moments of every active entry."""

    originals: bool  # the value that an entry had before it joined
    age: bool  # how often it was updated since it joined
    repeat: bool  # entries may leave: every entry that was ever active is remembered
    backend: str | None  # the requested backend
    release: bool = False  # room for the gradients that hooks gather at the active entries
    capturable: bool = False  # a replayed CUDA graph changes the counts without running any Python
    age_corrects: bool = True  # bias_correction="entry": the update op counts the ages and corrects by them
    replicas: bool = False  # other processes have to allocate and send the same

    def columns(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The arrays that are saved for parameters of `dtype`: name -> dtype, `indices` first."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        columns = {"indices": torch.int32, "exp_avg": wide, "exp_avg_sq": wide}
        if dtype in LOW_PRECISION:
            columns["master"] = wide
        if self.originals and not self.repeat:
            columns["originals"] = dtype
        if self.age:
            columns["age"] = torch.int32
        return columns

    def arrays(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The arrays that are kept: `columns`, and the gradients of a step that is not yet taken."""
        columns = self.columns(dtype)
        return columns | ({"gradient": columns["exp_avg"]} if self.release else {})


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. Only a copy to the CPU synchronises: the CPU might read it too early."""
    return tensor.to(device, non_blocking=device.type != "cpu")

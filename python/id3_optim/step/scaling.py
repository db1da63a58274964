"""What multiplies the gradients of one step: a GradScaler's scale, its overflow, and clipping."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..state.layout import moved


@dataclass(frozen=True)
class Scaling:
    """One-element tensors, each None where it does not apply; the kernels divide by scale, multiply by clip.

    A GradScaler leaves `grad_scale` and `found_inf` on the optimizer around `step()`. The host reads the
    overflow (`stopped`), or, in a step that a CUDA graph may hold, the kernels do (`found_inf`).
    """

    max_norm: float | None
    scale: Tensor | None
    found_inf: Tensor | None
    not_overflowed: Tensor | None  # bool [1]: False where this step must change nothing
    stopped: bool  # the host has seen an overflow: this step must change nothing
    clip: Tensor | None = None

    @classmethod
    def of(cls, optimizer: Any, max_norm: float | None, capturable: bool) -> Scaling:
        """The scaling of the optimizer's step, unclipped. Synchronises for `found_inf` unless capturable."""
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if found_inf is None or not capturable:
            return cls(max_norm, scale, None, None, stopped=found_inf is not None and bool(found_inf.item()))
        return cls(max_norm, scale, found_inf, found_inf.reshape(1) == 0, stopped=False)

    def clipped(self, squares: list[Tensor]) -> Scaling:
        """With the clip coefficient min(1, max_norm / (norm + 1e-6)), float32 [].

        squares: sums of squares, float64 [] each, of the gradients as they are, still multiplied by scale.
        None clips nothing.
        """
        if not squares:
            return self
        device = squares[0].device
        norm = torch.stack([_on(device, s) for s in squares]).sum().sqrt()
        if self.scale is not None:
            norm = norm / _on(device, self.scale)
        return replace(self, clip=(self.max_norm / (norm + 1e-6)).clamp(max=1.0).float())

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(scale, found_inf, clip) on a device, as the kernels take them."""
        return tuple(_on(device, x) for x in (self.scale, self.found_inf, self.clip))


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.device == device else moved(tensor, device)

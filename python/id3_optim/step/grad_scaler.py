"""Loss scaling for released gradients, which torch's GradScaler cannot see."""

from __future__ import annotations

import torch
from torch import Tensor


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler that also unscales and checks what an ID3AdamW keeps of released gradients.

    For any other optimizer it is torch's own. It finds NaN and infinities among the gradients of active
    entries and of dense groups; entries that are about to join have none by construction, and gradients that
    nothing uses are not looked at.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        scaled_tensors = getattr(optimizer, "scaled_tensors", list)
        for held in scaled_tensors():
            device_found = found.setdefault(held.device, found_inf.to(held.device, copy=True))
            torch._amp_foreach_non_finite_check_and_unscale_([held], device_found, inv_scale.to(held.device))
        found = found or {found_inf.device: found_inf}
        if hasattr(optimizer, "share_overflow"):
            optimizer.share_overflow(found)
        return found

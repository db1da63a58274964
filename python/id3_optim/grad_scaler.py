"""Loss scaling for released gradients, which torch's GradScaler can not see."""

from __future__ import annotations

import torch
from torch import Tensor


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler that also unscales and checks what an ID3AdamW keeps of released gradients.

    For any other optimizer it is torch's own. Found are NaN and infinities among the gradients of active
    entries, of entries that are about to join (none by their making) and of dense groups: gradients that
    nothing uses are not looked at.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        release = getattr(optimizer, "_release", None)
        if release is None:
            return found
        for held in release.scaled_tensors(optimizer):
            here = found.setdefault(held.device, found_inf.to(held.device, copy=True))
            torch._amp_foreach_non_finite_check_and_unscale_([held], here, inv_scale.to(held.device))
        release.seen_by_scaler = True
        return found or {found_inf.device: found_inf}

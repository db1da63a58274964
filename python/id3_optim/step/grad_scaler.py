"""Loss scaling for released gradients, which torch's GradScaler cannot see."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

SCALED: weakref.WeakSet[torch.amp.GradScaler] = weakref.WeakSet()  # those that live and have scaled a loss


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler that also unscales and checks what an ID3AdamW keeps of released gradients.

    For any other optimizer it is torch's own. It finds NaN and infinities among the gradients of active
    entries and of dense groups, and in steps that select among all gradients; in the steps between,
    gradients that nothing uses are not looked at.
    """

    def scale(self, outputs: Any) -> Any:
        """torch's; from the first call on, optimizers look for an overflow where they select."""
        if self.is_enabled():
            SCALED.add(self)
        return super().scale(outputs)

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


def check_seen(release: Any) -> None:
    """Raises RuntimeError where the GradScaler at work has not looked at what a `Release` has kept."""
    if not release.seen_by_scaler:
        own = ("release_gradients", "released gradients")
        option, unseen = own if release.exchange is None else release.exchange.unseen
        raise RuntimeError(
            f"{option}: torch's GradScaler does not see {unseen} (fp16 in the transformers Trainer and "
            "Accelerate uses it): use id3_optim.GradScaler, or bf16"
        )

"""The scores of the Fish mask: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from id3_kernels.reference import wide_dtype

from .distributed.part import is_split


def fisher_scores(
    model: torch.nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[torch.nn.Module, Any], Tensor],
    samples: int = 1024,
) -> dict[str, Tensor]:
    """Mean squared gradient of each trainable parameter over the first `samples` batches of `loader`.

    loss_fn(model, batch) returns the scalar loss of one batch. With batches of one example this is the
    diagonal of the empirical Fisher information (Sung et al., 2021); larger batches average gradients before
    squaring.
    Returns name → float32 tensor (float64 for float64 parameters), zero where no gradient arrived.
    Neither parameters nor any `.grad` are changed; call `model.eval()` first to switch dropout off. All ranks
    of a run need the same scores: give them the same batches.
    Raises ValueError if the loader has no batch or no gradient arrives, and for split parameters.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if split := next((name for name, p in named.items() if is_split(p)), None):
        raise ValueError(f"{split}: expected a whole parameter, got a DTensor; score it before the split")
    sums = {name: torch.zeros_like(p, dtype=wide_dtype(p.dtype)) for name, p in named.items()}
    count, arrived = 0, False
    for batch in islice(loader, samples):
        loss = loss_fn(model, batch)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for total, grad in zip(sums.values(), grads, strict=True):
            if grad is not None:
                wide, arrived = grad.to(total.dtype), True
                total.addcmul_(wide, wide)
        count += 1
    if count == 0:
        raise ValueError(f"loader: expected at least one batch (samples={samples}), got none")
    if not arrived:
        raise ValueError("loss_fn: expected a loss of the model's parameters, got no gradient for any")
    return {name: total.div_(count) for name, total in sums.items()}

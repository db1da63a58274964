"""Dense groups: parameters that are trained whole, by torch's own fused AdamW."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..distributed.part import local, local_gradient
from ..param_groups import numbers_of
from .scaling import Scaling


def make_moments(state: MutableMapping[Tensor, dict], group: dict[str, Any]) -> None:
    """The state (torch's: step, exp_avg, exp_avg_sq) of the parameters that have their first gradient now."""
    for p in group["params"]:
        if p.grad is not None and "exp_avg" not in state[p]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            moments = [torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2)]
            state[p] |= {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}


def update_dense(state: MutableMapping[Tensor, dict], group: dict[str, Any], scaling: Scaling) -> None:
    """One AdamW step on every entry of the group's parameters that have a gradient.

    Nothing changes where the scaling's `found_inf` is given and not 0. Mutates the parameters and their
    `state` of `make_moments`.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    grads = [_scaled(local_gradient(p), scaling.scale, scaling.clip).to(p.dtype) for p in params]
    exp_avgs, exp_avg_sqs, steps = (
        [local(state[p][key]) for p in params] for key in ("exp_avg", "exp_avg_sq", "step")
    )
    device = params[0].device
    (lr, beta1, beta2, eps, weight_decay), tensor_lr = numbers_of(group, device)
    found_inf = scaling.on(device)[1]
    adamw(
        [local(p) for p in params],
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=all(p.device.type in ("cpu", "cuda") for p in params),
        found_inf=None if found_inf is None else found_inf.reshape(()),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr if tensor_lr is None else tensor_lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=group["maximize"],
    )


def _scaled(grad: Tensor, scale: Tensor | None, clip: Tensor | None) -> Tensor:
    """grad / scale * clip in float32 at least: GradScaler's first scale is infinite in float16."""
    if scale is None and clip is None:
        return grad
    wide = grad if grad.dtype == torch.float64 else grad.float()
    wide = wide if scale is None else wide / scale.to(wide)
    return wide if clip is None else wide * clip.to(wide)

"""What a step needs of one tensor's gradient, on a backend that has selection but no kernel for this."""

import torch

from .reference import keep_best_


def collect_by_selection_(
    select_topk, select_topk_by_score, param, grad, score, indices, values, add, position,
    best_score, best_place, best_grad, again, eps, exp,
):  # fmt: skip
    """`collect_` of the op table through a backend's own selection. Nothing here asks the device.

    A tensor of other than row-major strides is copied to be read.
    """
    grad, n = grad.contiguous(), indices.numel()
    if n:
        here = grad.view(-1)[indices].to(values.dtype)
        values.add_(here) if add else values.copy_(here)
    k = min(best_score.numel(), grad.numel())
    if k == 0:
        return
    offsets = torch.zeros(2, dtype=torch.int64, device=indices.device)
    offsets[1:].fill_(n)  # the number travels with the kernel: nothing is copied, nobody waits
    if score is None:
        _, index, best = select_topk([param], [grad], offsets, indices, k, eps, exp)
    else:
        _, index, best = select_topk_by_score([score], offsets, indices, k)
    keep_best_(grad, position, index.to(torch.int64), best, best_score, best_place, best_grad, again)

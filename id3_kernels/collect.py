"""The best entries so far, on a backend that has selection but no kernel for this."""

import torch

from .reference import keep_best_


def best_by_selection_(
    select_topk, select_topk_by_score, param, grad, score, offsets, indices, position,
    best_score, best_place, best_grad, k, capacity, again, eps, exp,
):  # fmt: skip
    """The candidates of `collect_` of the op table, through a backend's own selection, best first.

    capacity: at least k, on the host; at most the room for candidates. Nothing here asks the device. A tensor
    of other than row-major strides is copied to be read.
    """
    capacity = min(capacity, grad.numel())
    if capacity == 0:
        return
    entries, grad = (offsets, indices, k, capacity), grad.contiguous()
    if score is None:
        _, index, best = select_topk([param], [grad], *entries, eps, exp)
    else:
        _, index, best = select_topk_by_score([score], *entries)
    keep_best_(grad, position, index.to(torch.int64), best, best_score, best_place, best_grad, again)

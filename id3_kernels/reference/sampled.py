"""Weight gradients at active entries alone, in the order of sums of `csrc/formulas/sampled.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..entries import runs

LANES = 32
BLOCK_TOKENS = 128


def sampled_weight_grad_(left, right, offsets, indices, values, add):
    for run in runs(offsets):
        own = slice(*run.tolist())
        row, column = _places(indices[own], right.shape[1])
        _write(values[own], _summed_products(left, right, row, column, values.dtype), add)


def sampled_embedding_grad_(grad, ids, offsets, indices, values, add):
    ids, order = ids.sort(stable=True)
    for run in runs(offsets):
        own = slice(*run.tolist())
        row, column = _places(indices[own], grad.shape[1])
        first, last = (torch.searchsorted(ids, row, right=right) for right in (False, True))
        sums, most = torch.zeros_like(values[own]), int((last - first).max()) if row.numel() else 0
        for nth in range(most):
            held = (first + nth < last).nonzero().flatten()
            token = order[first[held] + nth]
            sums[held] += grad[token, column[held]].to(values.dtype)
        _write(values[own], sums, add)


def _places(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of flat indices, int64."""
    index = indices.to(torch.int64)
    return index // max(columns, 1), index % max(columns, 1)


def _write(values: Tensor, sums: Tensor, add: bool) -> None:
    values.copy_(values + sums if add else sums)


def _summed_products(left: Tensor, right: Tensor, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """[entries]: Σ_t left[t, row] · right[t, column], every operation rounded once to dtype."""
    total = None
    for begin in range(0, max(left.shape[0], 1), BLOCK_TOKENS):
        factors = [left[begin : begin + BLOCK_TOKENS, row], right[begin : begin + BLOCK_TOKENS, column]]
        a, b = (_whole_block(factor.to(dtype)) for factor in factors)
        block = _summed_block(a * b)
        total = block if total is None else total + block
    return total


def _whole_block(factor: Tensor) -> Tensor:
    """The factor [tokens, entries], and zeros for the tokens that lack."""
    lacking = BLOCK_TOKENS - factor.shape[0]
    return torch.cat([factor, factor.new_zeros(lacking, factor.shape[1])]) if lacking else factor


def _summed_block(products: Tensor) -> Tensor:
    """The sums over the tokens of one block [BLOCK_TOKENS, entries]: lanes, neighbouring lanes, folds."""
    first, *others = products.split(LANES)
    for other in others:
        first = first + other
    sums = first[0::2] + first[1::2]
    while sums.shape[0] > 1:
        low, high = sums.chunk(2)
        sums = low + high
    return sums[0]

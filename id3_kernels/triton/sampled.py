"""Weight gradients at active entries alone, in the order of sums of `csrc/formulas/sampled.h`.

Both factors are transposed, which pads the tokens to whole blocks, so that no load of a product has a mask
and all of them are 16 bytes wide. A program takes BLOCK neighbouring entries, and all tokens.
Per entry and block of 128 tokens of bfloat16: 256 bytes of a column of each factor, mostly from the caches,
256 widenings and 255 operations, in vectors over entries and lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import runs
from ..reference.sampled import BLOCK_TOKENS, LANES
from . import launch

TILE = 64  # tokens and columns that a program turns
BLOCK = 32
EMBEDDING_BLOCK = 256


@triton.jit
def columns_kernel(
    matrix, turned, n_tokens, n_columns, token_stride, column_stride, padded, TILE: tl.constexpr
):  # fmt: skip
    """turned [n_columns, padded]: the transpose of the matrix, with zeros behind its tokens."""
    across = tl.cdiv(n_columns, TILE)
    t = (tl.program_id(0) // across).to(tl.int64) * TILE + tl.arange(0, TILE)
    c = (tl.program_id(0) % across).to(tl.int64) * TILE + tl.arange(0, TILE)
    places = t[:, None] * token_stride + c[None, :] * column_stride
    x = tl.load(matrix + places, mask=(t < n_tokens)[:, None] & (c < n_columns)[None, :], other=0)
    tl.store(turned + c[:, None] * padded + t[None, :], tl.trans(x), mask=(c < n_columns)[:, None])


@triton.jit
def widened(x, CODE: tl.constexpr):
    """float32; bfloat16 comes as int16, because the conversion of Triton's interpreter loses subnormals."""
    if CODE == 1:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def fold(sums, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """sums [BLOCK, 2 · HALF]: the upper half added to the lower one."""
    low, high = tl.split(tl.permute(tl.reshape(sums, [BLOCK, 2, HALF]), (0, 2, 1)))
    return low + high


@triton.jit
def summed_lanes(lanes, BLOCK: tl.constexpr):
    """[BLOCK]: the sum of 32 lanes, neighbours first, then folded in halves."""
    even, odd = tl.split(tl.reshape(lanes, [BLOCK, 16, 2]))
    sums = fold(fold(even + odd, BLOCK, 8), BLOCK, 4)
    return tl.reshape(fold(fold(sums, BLOCK, 2), BLOCK, 1), [BLOCK])


@triton.jit
def products_kernel(
    left, right, offsets, indices, values, n_columns, padded, CODE: tl.constexpr, ADD: tl.constexpr,
    LANES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The entries of one run; left, right: of `columns_kernel`."""
    at = tl.load(offsets) + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < tl.load(offsets + 1)
    index = tl.load(indices + at, mask=held, other=0)
    row, lane = index // n_columns, tl.arange(0, LANES)
    a = left + row.to(tl.int64)[:, None] * padded + lane[None, :]
    b = right + (index - row * n_columns).to(tl.int64)[:, None] * padded + lane[None, :]
    total = tl.full([BLOCK], -0.0, tl.float32)  # -0 + x is x for every x
    n_tokens = padded * tl.max(held.to(tl.int32))  # 0 in a program beyond the last entry
    for _ in range(0, n_tokens, BLOCK_TOKENS):
        lanes = widened(tl.load(a), CODE) * widened(tl.load(b), CODE)
        for step in tl.static_range(LANES, BLOCK_TOKENS, LANES):
            lanes += widened(tl.load(a + step), CODE) * widened(tl.load(b + step), CODE)
        total += summed_lanes(lanes, BLOCK)
        a += BLOCK_TOKENS
        b += BLOCK_TOKENS
    if ADD:
        total = tl.load(values + at, mask=held, other=0.0) + total
    tl.store(values + at, total, mask=held)


@triton.jit
def embedding_kernel(
    matrix, token_stride, column_stride, tokens, first, last, offsets, indices, values, n_columns,
    CODE: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The entries of one run. tokens: sorted by their ids; first, last: those of each entry's row."""
    at = tl.load(offsets) + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < tl.load(offsets + 1)
    column = tl.load(indices + at, mask=held, other=0) % n_columns
    begin = tl.load(first + at, mask=held, other=0)
    count = tl.load(last + at, mask=held, other=0) - begin
    column = column.to(tl.int64) * column_stride
    total = tl.zeros([BLOCK], tl.float32)
    for nth in range(0, tl.max(count)):
        mine = nth < count
        token = tl.load(tokens + begin + nth, mask=mine, other=0)
        total += widened(tl.load(matrix + token * token_stride + column, mask=mine, other=0), CODE)
    if ADD:
        total = tl.load(values + at, mask=held, other=0.0) + total
    tl.store(values + at, total, mask=held)


def sampled_weight_grad_(left, right, offsets, indices, values, add):
    """See `table.OPS`."""
    launch.check(left, right)
    device, n = offsets.device, min(indices.numel(), left.shape[1] * right.shape[1])
    padded = triton.cdiv(max(left.shape[0], 1), BLOCK_TOKENS) * BLOCK_TOKENS
    factors = [_columns(matrix, padded) for matrix in (left, right)]
    for run in runs(offsets):
        launch.run(
            products_kernel, triton.cdiv(n, BLOCK), 4, device, *factors, run, indices, values,
            right.shape[1], padded, launch.CODES[left.dtype], add, LANES, BLOCK_TOKENS, BLOCK,
        )  # fmt: skip


def _moved(matrix: Tensor) -> Tensor:
    """bfloat16 by its bits."""
    return matrix.view(torch.int16) if matrix.dtype == torch.bfloat16 else matrix


def _columns(matrix: Tensor, padded: int) -> Tensor:
    """[columns, padded]: the transpose, and zeros."""
    matrix = _moved(matrix)
    tokens, columns = matrix.shape
    out = matrix.new_empty(columns, padded)
    launch.run(
        columns_kernel, triton.cdiv(columns, TILE) * (padded // TILE), 4, matrix.device, matrix, out,
        tokens, columns, *matrix.stride(), padded, TILE,
    )  # fmt: skip
    return out


def sampled_embedding_grad_(grad, ids, offsets, indices, values, add):
    """See `table.OPS`."""
    launch.check(grad)
    ids, tokens = ids.sort(stable=True)
    row = (indices // max(grad.shape[1], 1)).to(torch.int64)
    first, last = (torch.searchsorted(ids, row, right=right) for right in (False, True))
    for run in runs(offsets):
        launch.run(
            embedding_kernel, triton.cdiv(indices.numel(), EMBEDDING_BLOCK), 4, offsets.device, _moved(grad),
            *grad.stride(), tokens, first, last, run, indices, values, grad.shape[1],
            launch.CODES[grad.dtype], add, EMBEDDING_BLOCK,
        )  # fmt: skip

"""Tensors of more entries than an int32 index reaches, as pieces: ranges of their rows.

Kernels know pieces alone, each a tensor of its own. Users see whole tensors, with flat indices of int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

LARGEST = 2**31 - 1  # the most entries of a tensor whose flat indices are int32
INDEX_BITS = 32  # of a place, tensor number << bits | flat index, as the kernels have it


class Rows(NamedTuple):
    """The rows first:end of a tensor: a piece of it."""

    first: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor: a view."""
        return tensor[self.first : self.end]

    def bounds(self, shape: Sequence[int]) -> tuple[int, int]:
        """Flat indices into a tensor of that shape: where the rows begin, and end."""
        row = math.prod(shape[1:])
        return self.first * row, self.end * row


def index_dtype(tensor: Tensor) -> torch.dtype:
    """That of flat indices into a tensor: int32, or int64 where it is large; a lazy one is not yet."""
    return torch.int32 if is_lazy(tensor) else index_dtype_of(tensor.shape)


def index_dtype_of(shape: Sequence[int]) -> torch.dtype:
    """That of flat indices into a tensor of that shape."""
    return torch.int32 if math.prod(shape) <= LARGEST else torch.int64


def index_bits(sizes: Iterable[int]) -> int:
    """The bits of a place for indices into whole tensors of so many entries: `INDEX_BITS`, or more where one
    of them needs more."""
    return max(INDEX_BITS, *((size - 1).bit_length() for size in sizes), 0)


def pieces_of(name: str, shape: Sequence[int]) -> list[Rows] | None:
    """The pieces of a tensor of that shape, of at most `LARGEST` entries each; None for one that is whole.

    Raises ValueError, with the tensor's name, where a row alone is larger.
    """
    if math.prod(shape) <= LARGEST:
        return None
    step = LARGEST // math.prod(shape[1:])
    if step == 0:
        raise ValueError(f"{name}: expected rows of at most {LARGEST} entries, got {math.prod(shape[1:])}")
    return [Rows(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def rows_of(tensor: Tensor, rows: Rows | None) -> Tensor:
    """A detached view of the rows; without any the tensor itself, and a sparse one, which has no views."""
    return tensor if rows is None or tensor.layout != torch.strided else rows.of(tensor.detach())


def cut(tensor: Tensor, indices: Tensor) -> Iterator[tuple[Tensor, slice, Tensor]]:
    """For each piece a view, which of the ascending flat indices lie in it, and these as int32 into it.

    A tensor without pieces is one, and its indices stay the same object.
    """
    pieces = pieces_of("tensor", tensor.shape)
    if pieces is None:
        yield tensor, slice(0, indices.numel()), indices
        return
    for rows in pieces:
        held, own = inside(rows, tensor.shape, indices)
        yield rows.of(tensor), held, own


def inside(rows: Rows, shape: Sequence[int], indices: Tensor) -> tuple[slice, Tensor]:
    """Which of the ascending flat indices into a tensor of that shape lie in the rows; these as int32 into
    the rows."""
    bounds = torch.tensor(rows.bounds(shape), dtype=indices.dtype, device=indices.device)
    first, last = torch.searchsorted(indices, bounds).tolist()
    return slice(first, last), (indices[first:last] - bounds[0]).to(torch.int32)


def joined(rows: Sequence[Rows], shape: Sequence[int], indices: Sequence[Tensor]) -> Tensor:
    """int64: the flat indices into the whole tensor from those into its pieces."""
    begins = [own.bounds(shape)[0] for own in rows]
    return torch.cat([index.long() + begin for index, begin in zip(indices, begins, strict=True)])

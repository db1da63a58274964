"""The tensors of a shard, whole parameters and pieces of large ones, and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.part import is_split, local, local_gradient
from ..param_groups import Piece
from ..pieces import Rows, joined, rows_of


class Slice(NamedTuple):
    """The tensors first:last of a shard, which all belong to param group `group`."""

    group: int
    first: int
    last: int


class Tensors:
    """Lists with an element for each tensor.

    `owners` are the tensors that the optimizer was given, `params` what this rank holds of them: the same but
    for DTensors, and for parameters too large for int32, each of whose pieces is a tensor here.
    """

    def __init__(self) -> None:
        self.owners: list[Tensor] = []
        self.params: list[Tensor] = []
        self.ranges: list[Rows | None] = []  # of pieces; None for a tensor that is whole
        self.split = False  # whether a tensor is a DTensor or a piece, so that `params` have to be renewed
        self.positions: list[int] = []
        self.numbers: list[int] = []
        self.shapes: list[torch.Size] = []  # of all that this rank holds of the owner, when added
        self.strides: list[tuple[int, ...]] = []  # when last checked
        self.slices: list[Slice] = []
        self.numel = 0

    def extend(self, added: list[Piece]) -> None:
        """Appends tensors; numbers must ascend."""
        for number, rows, (position, group, owner) in added:
            held = local(owner)
            self.owners.append(owner)
            self.params.append(rows_of(held, rows))
            self.ranges.append(rows)
            self.split |= is_split(owner) or rows is not None
            self.positions.append(position)
            self.numbers.append(number)
            self.shapes.append(held.shape)
            self.strides.append(self.params[-1].stride())
            self.numel += self.params[-1].numel()
            n = len(self.params)
            if self.slices and self.slices[-1].group == group:
                self.slices[-1] = self.slices[-1]._replace(last=n)
            else:
                self.slices.append(Slice(group, n - 1, n))

    def pieces(self, j: int) -> range:
        """The tensors that are pieces of tensor j's owner, from the first on, which j is; a whole one: j."""
        if self.ranges[j] is None:
            return range(j, j + 1)
        owner, last = self.owners[j], j + 1
        while last < len(self.owners) and self.owners[last] is owner:
            last += 1
        return range(j, last)

    def firsts(self) -> list[int]:
        """Of each parameter its first tensor, or its only one."""
        return [j for j, rows in enumerate(self.ranges) if rows is None or rows.first == 0]

    def joined(self, j: int, indices: Sequence[Tensor]) -> Tensor:
        """Flat indices into the owner of the pieces from j on, from those into each of them."""
        own = self.ranges[j : j + len(indices)]
        return indices[0] if own[0] is None else joined(own, self.shapes[j], indices)

    def renew(self, tensors: Sequence[int] | None = None) -> None:
        """Takes what this rank holds of split tensors (None: of all) anew: a trainer may have moved it to
        other memory."""
        for j in range(len(self.owners)) if tensors is None else tensors:
            self.params[j] = rows_of(local(self.owners[j]), self.ranges[j])

    def gradients(self) -> list[Tensor | None]:
        """What this rank holds of the gradient of each tensor; None where its owner has none."""
        held = map(local_gradient, self.owners)
        return [g if g is None else rows_of(g, rows) for g, rows in zip(held, self.ranges, strict=True)]

"""Values at entries of a fixed list of tensors, flat: sets of them are joined and compared in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import id3_kernels
from id3_kernels import Entries
from id3_kernels.hashing import bits

from ..distributed.part import is_split
from .fingerprint import by_kind


class Rows(NamedTuple):
    """Values at entries of the tensors of one device and dtype: `values` [n] beside `entries.indices` [n]."""

    entries: Entries
    values: Tensor

    @classmethod
    def empty(cls, tensors: Sequence[Tensor]) -> Rows:
        """No entry of any of the tensors."""
        entries = Entries.empty(len(tensors), tensors[0].device)
        return cls(entries, tensors[0].new_empty(0))

    @classmethod
    def of(cls, tensors: Sequence[Tensor], rows: Mapping[int, tuple[Tensor, Tensor]]) -> Rows:
        """rows: number of a tensor → its ascending flat indices, int32, and the values there."""
        if not rows:
            return cls.empty(tensors)
        device, order = tensors[0].device, sorted(rows)
        counts = torch.zeros(len(tensors) + 1, dtype=torch.int64)
        counts[torch.tensor(order) + 1] = torch.tensor([rows[i][0].numel() for i in order])
        indices, values = (torch.cat([rows[i][side].to(device) for i in order]) for side in (0, 1))
        return cls(Entries(counts.cumsum(0).to(device), indices), values)

    def joined(self, second: Rows) -> Rows:
        """The entries of both, with this set's values where both have one."""
        if second.entries.indices.numel() == 0 or self._same_entries(second):
            return self
        union, *places = id3_kernels.union(self.entries, second.entries)
        if union.indices.numel() == self.values.numel():  # all entries of the second are among these
            return self
        values = self.values.new_empty(union.indices.numel())
        values[places[1]] = second.values
        values[places[0]] = self.values
        return Rows(union, values)

    def held(self, tensors: Sequence[Tensor]) -> Rows:
        """The values that the tensors hold at these entries."""
        return self._replace(values=id3_kernels.gather(tensors, self.entries))

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Puts the values into the tensors, in place."""
        id3_kernels.scatter_(tensors, self.entries, self.values)

    def at(self, entries: Entries) -> Rows:
        """The values at `entries`, which are all among these."""
        return Rows(entries, self.values[id3_kernels.union(self.entries, entries)[2]])

    def changed(self, now: Tensor) -> tuple[Entries, Tensor, Tensor]:
        """The entries whose bits differ from those of `now` [n], with the values here and in `now`."""
        at = (bits(self.values) != bits(now)).nonzero().squeeze(1)
        offsets = torch.searchsorted(at, self.entries.offsets)
        return Entries(offsets, self.entries.indices[at]), self.values[at], now[at]

    def counts(self) -> list[int]:
        """How many entries each tensor has."""
        return self.entries.offsets.diff().tolist()

    def clone(self) -> Rows:
        """A copy that shares no memory."""
        return Rows(Entries(*(t.clone() for t in self.entries)), self.values.clone())

    def _same_entries(self, second: Rows) -> bool:
        return all(map(torch.equal, self.entries, second.entries))


class Kind(NamedTuple):
    """The tensors of one device and dtype among named ones, in order."""

    names: list[str]
    tensors: list[Tensor]


class Memory:
    """Where named tensors lie when something is made of them (`owner`): what keeps views of them has to know
    whether a model has been moved or cast since. remedy: what to do then. Raises ValueError for a DTensor."""

    def __init__(self, named: Mapping[str, Tensor], owner: str, remedy: str) -> None:
        self._owner, self._remedy = owner, remedy
        if split := next((name for name, tensor in named.items() if is_split(tensor)), None):
            raise ValueError(
                f"{split}: expected a whole parameter for a {owner}, got a DTensor; `Delta.apply` takes them"
            )
        self._lie = [(name, tensor, tensor.data_ptr()) for name, tensor in named.items()]

    def check(self) -> None:
        """Raises ValueError for a tensor that lies elsewhere now."""
        for name, tensor, pointer in self._lie:
            if tensor.data_ptr() != pointer:
                raise ValueError(
                    f"{name}: expected the memory that it had when the {self._owner} was made, got another: "
                    f"the model was moved or cast; {self._remedy}"
                )


def kinds_of(named: Mapping[str, Tensor]) -> list[Kind]:
    """The named tensors by device and dtype."""
    names, tensors = list(named), list(named.values())
    return [Kind([names[i] for i in kind], [tensors[i].detach() for i in kind]) for kind in by_kind(tensors)]

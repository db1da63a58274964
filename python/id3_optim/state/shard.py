"""The flat state of one device and dtype: what the optimizer keeps for each active entry."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from id3_kernels import Entries, backend, table
from id3_kernels.entries import sort_keys

from .layout import Layout, moved

_MASKS_KEPT = 64  # patterns of missing gradients


class Slice(NamedTuple):
    """The tensors first:last of a shard, which all belong to param group `group`."""

    group: int
    first: int
    last: int


class Shard:
    """The active entries of all selectable tensors of one device and dtype, and their state.

    `arrays["indices"]` and the arrays beside it hold the active entries in (tensor, flat index) order, with
    padding behind the last; `offsets` int64 [M + 1], on the device, says which entries are whose. `steps`
    int64 [M] counts the steps in which each tensor had a gradient; `updated_at` int64 [M] is the optimizer's
    step count after the last of them.

    `bounds`, `n_active` and `leave` synchronise with a GPU; nothing else does.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, layout: Layout):
        self.device, self.dtype, self.layout = device, dtype, layout
        if device.type == "cpu" and layout.backend is None and backend.native() is None:
            why = backend.available_backends()["cpu"]
            warnings.warn(f"id3_optim runs its slow reference kernels: {why}", stacklevel=2)
        self.kernels = table.kernels_for(device, layout.backend)
        self.params: list[Tensor] = []
        self.positions: list[int] = []
        self.slices: list[Slice] = []
        self.offsets = torch.zeros(1, dtype=torch.int64, device=device)
        self.steps = torch.zeros(0, dtype=torch.int64, device=device)
        self.updated_at = torch.zeros(0, dtype=torch.int64, device=device)
        self.numel = 0
        self.limit = 0  # the most entries that may ever be active here
        self.arrays = {
            name: torch.empty(0, dtype=d, device=device) for name, d in layout.arrays(dtype).items()
        }
        self._bounds: list[int] | None = None
        self._masks: dict[tuple[bool, ...], Tensor] = {}

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "kernels"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.kernels = table.kernels_for(self.device, self.layout.backend)

    def add(self, param: Tensor, position: int, group: int) -> None:
        """Appends a tensor; positions must ascend."""
        self.params.append(param)
        self.positions.append(position)
        n = len(self.params)
        if self.slices and self.slices[-1].group == group:
            self.slices[-1] = self.slices[-1]._replace(last=n)
        else:
            self.slices.append(Slice(group, n - 1, n))
        self.numel += param.numel()
        self.offsets = torch.cat([self.offsets, self.offsets[-1:]])
        self.position_table = torch.tensor(self.positions, device=self.device)
        self._bounds, self._masks = None, {}
        self.steps = torch.cat([self.steps, self.steps.new_zeros(1)])
        self.updated_at = torch.cat([self.updated_at, self.updated_at.new_zeros(1)])

    # --- entries -----------------------------------------------------------------------------------

    @property
    def bounds(self) -> list[int]:
        """`offsets` on the host."""
        if self._bounds is None or self.layout.capturable:
            self._bounds = self.offsets.tolist()
        return self._bounds

    @property
    def n_active(self) -> int:
        return self.bounds[-1]

    @property
    def active(self) -> Entries:
        """The active entries, with padding behind the last index."""
        return Entries(self.offsets, self.arrays["indices"])

    def column(self, name: str, j: int) -> Tensor | None:
        """The part of an array that belongs to tensor j; None where the layout has no such array."""
        begin, end = self.bounds[j : j + 2]
        return self.arrays[name][begin:end] if name in self.arrays else None

    def reserve(self, n: int) -> None:
        """Gives the arrays a capacity of at least n entries."""
        for name, old in self.arrays.items():
            if old.numel() < n:
                # Padding of the gradients must not be NaN: a loss scaler looks at the whole array.
                self.arrays[name] = old.new_zeros(n) if name == "gradient" else old.new_empty(n)
                self.arrays[name][: old.numel()] = old

    def _make_room(self, n: int) -> None:
        """Capacity for n entries more; at least doubles, so that many small steps do not copy often."""
        capacity = self.arrays["indices"].numel()
        if capacity < self.limit and self.n_active + n > capacity:
            self.reserve(min(max(self.n_active + n, 2 * capacity), self.limit))

    def join(self, new: Entries, gradient: Tensor | None = None) -> None:
        """Adds entries that are not active yet, with zero moments (and their gradients, where released)."""
        self._make_room(new.indices.numel())
        values = self.kernels.gather(self.params, *new)
        first = {"originals": values, "master": values.to(self.arrays["exp_avg"].dtype), "gradient": gradient}
        names, arrays = zip(*self.arrays.items(), strict=True)
        self.kernels.join_(list(arrays), self.offsets, *new, [first.get(name) for name in names[1:]])
        self._bounds = None

    def leave(self, new: Entries) -> None:
        """Takes back `join(new)`, before anything was updated."""
        new = new.trimmed()
        n = self.n_active
        stays = torch.ones(n, dtype=torch.bool, device=self.device)
        n_new = new.indices.numel()
        stays[torch.searchsorted(sort_keys(self.active, n), sort_keys(new, n_new))] = False
        for array in self.arrays.values():
            array[: n - n_new] = array[:n][stays]
        self.offsets -= new.offsets
        self._bounds = None

    def hold(self, offsets: Tensor, arrays: dict[str, Tensor]) -> None:
        """Makes other entries the active ones: all of `arrays` that are given, [capacity] each."""
        self.offsets, self._bounds = offsets, None
        self.arrays |= arrays

    # --- steps -------------------------------------------------------------------------------------

    def mask(self, present: list[bool]) -> Tensor:
        """bool [M] on the device. Kept, since a CUDA graph cannot hold the copy of a pattern's first use."""
        if tuple(present) not in self._masks:
            if len(self._masks) == _MASKS_KEPT:
                self._masks.clear()
            self._masks[tuple(present)] = moved(torch.tensor(present), self.device)
        return self._masks[tuple(present)]

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
# A recent run of at most this part of the capacity: a larger one costs more at each join, a smaller one is
# merged more often. Of 1/16, 1/32 and 1/64 this is the cheapest (5M entries, 1,700 joining at each step).
RECENT_SHARE = 32


class Slice(NamedTuple):
    """The tensors first:last of a shard, which all belong to param group `group`."""

    group: int
    first: int
    last: int


class Recent:
    """The run of entries that have joined since the last `Shard.settle`. It lies at `begin` in the arrays.

    offsets int64 [M + 1] are relative to `begin`. The host knows that there are at most `count` entries of
    `room`; a GPU may hold fewer.
    """

    def __init__(self, offsets: Tensor):
        self.offsets = offsets
        self.begin = self.room = self.count = 0

    def takes(self, n: int) -> bool:
        """Whether n entries more fit."""
        return self.count + n <= self.room


class Shard:
    """The active entries of all selectable tensors of one device and dtype, and their state.

    `arrays["indices"]` and the arrays beside it hold the active entries in one or two runs, each in (tensor,
    flat index) order: `offsets` int64 [runs, M + 1], on the device, are those of an active set of the op
    table. The settled run begins at 0. A recent run at the far end of the arrays takes what joins, so that a
    join moves few entries; `settle` merges it into the first when it is full.

    `steps` int64 [M] counts the steps in which each tensor had a gradient; `updated_at` int64 [M] is the
    optimizer's step count after the last of them. `n_active`, `column` and `leave` synchronise with a GPU;
    nothing else does.
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
        self.offsets = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.steps = torch.zeros(0, dtype=torch.int64, device=device)
        self.updated_at = torch.zeros(0, dtype=torch.int64, device=device)
        self.position_table = torch.zeros(0, dtype=torch.int64, device=device)
        self.numel = 0
        self.limit = 0  # the most entries that may ever be active here
        self.arrays = {
            name: torch.empty(0, dtype=d, device=device) for name, d in layout.arrays(dtype).items()
        }
        self._recent = Recent(self.offsets[0])
        self._at_most = 0  # an upper bound of n_active that the host knows
        self._bounds: list[list[int]] | None = None
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
        self.settle()
        self.offsets = torch.cat([self.offsets, self.offsets[:, -1:]], 1)
        self._recent = Recent(torch.zeros_like(self.offsets[0]))
        self.position_table = torch.tensor(self.positions, device=self.device)
        self._bounds, self._masks = None, {}
        self.steps = torch.cat([self.steps, self.steps.new_zeros(1)])
        self.updated_at = torch.cat([self.updated_at, self.updated_at.new_zeros(1)])

    # --- entries -----------------------------------------------------------------------------------

    @property
    def bounds(self) -> list[list[int]]:
        """`offsets` on the host."""
        if self._bounds is None or self.layout.capturable:
            self._bounds = self.offsets.tolist()
        return self._bounds

    @property
    def n_active(self) -> int:
        return sum(run[-1] - run[0] for run in self.bounds)

    def column(self, name: str, j: int) -> Tensor | None:
        """The part of an array that belongs to tensor j; None where the layout has no such array. Settles."""
        self.settle()
        begin, end = self.bounds[0][j : j + 2]
        return self.arrays[name][begin:end] if name in self.arrays else None

    def reserve(self, n: int) -> None:
        """Gives the arrays a capacity of at least n entries. Settles where they grow."""
        if self.arrays["indices"].numel() < n:
            self.settle()
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
        n = new.indices.numel()
        self._make_room(n)
        values = self.kernels.gather(self.params, *new)
        first = {"originals": values, "master": values.to(self.arrays["exp_avg"].dtype), "gradient": gradient}
        first = [first.get(name) for name in self.arrays if name != "indices"]
        if not self._recent.takes(n):
            self.settle()
            self._open_recent()
        recent = self._recent
        if recent.takes(n):
            arrays = [array[recent.begin :] for array in self.arrays.values()]
            self.kernels.join_(arrays, recent.offsets, *new, first)
            self.offsets = torch.stack([self.offsets[0], recent.offsets + recent.begin])
            recent.count += n
        else:
            recent.room = 0  # the settled run grows over what was free for a recent one
            self.kernels.join_(list(self.arrays.values()), self.offsets[0], *new, first)
        self._at_most, self._bounds = min(self._at_most + n, self.limit), None

    def _open_recent(self) -> None:
        """Finds room for a recent run behind the settled one, as far as the host knows where that ends."""
        if self.layout.capturable or self.layout.repeat:
            return  # a graph replays no decision of the host; with "repeat" nothing joins
        if self.device.type == "cpu":
            self._at_most = self.n_active
        capacity = self.arrays["indices"].numel()
        begin = max(capacity - capacity // RECENT_SHARE, self._at_most)
        self._recent.begin, self._recent.room = begin, capacity - begin

    def settle(self) -> None:
        """Makes one run of two. The set of entries and their state stay the same."""
        recent = self._recent
        if recent.count == 0:
            return
        settled, arrays = self.offsets[0].clone(), list(self.arrays.values())
        indices, *values = (array[recent.begin :].clone() for array in arrays)  # the merge writes over them
        self.kernels.join_(arrays, settled, recent.offsets, indices, values)
        self.offsets, self._bounds = settled.unsqueeze(0), None
        self._recent = Recent(torch.zeros_like(settled))

    def leave(self, new: Entries) -> None:
        """Takes back `join(new)`, before anything was updated."""
        new = new.trimmed()
        run = len(self.offsets) - 1
        begin, end = self.bounds[run][0], self.bounds[run][-1]
        held = Entries(self.offsets[run] - begin, self.arrays["indices"][begin:])
        n, n_new = end - begin, new.indices.numel()
        stays = torch.ones(n, dtype=torch.bool, device=self.device)
        stays[torch.searchsorted(sort_keys(held, n), sort_keys(new, n_new))] = False
        for array in self.arrays.values():
            array[begin : end - n_new] = array[begin:end][stays]
        self.offsets[run] -= new.offsets
        if run:
            self._recent.offsets -= new.offsets
        self._bounds = None

    def hold(self, offsets: Tensor, n: int, arrays: dict[str, Tensor]) -> None:
        """Makes n other entries the active ones, in one run: offsets [M + 1], all `arrays` that are given."""
        self.offsets, self._bounds = offsets.unsqueeze(0), None
        self._recent, self._at_most = Recent(torch.zeros_like(offsets)), n
        self.arrays |= arrays

    def tables(self) -> list[Tensor]:
        """All tensors with an element per tensor."""
        return [self.offsets, self._recent.offsets, self.steps, self.updated_at, self.position_table]

    # --- steps -------------------------------------------------------------------------------------

    def mask(self, present: list[bool]) -> Tensor:
        """bool [M] on the device. Kept, since a CUDA graph cannot hold the copy of a pattern's first use."""
        if tuple(present) not in self._masks:
            if len(self._masks) == _MASKS_KEPT:
                self._masks.clear()
            self._masks[tuple(present)] = moved(torch.tensor(present), self.device)
        return self._masks[tuple(present)]

"""The flat state of one device and dtype: what the optimizer keeps for each active entry."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from id3_kernels import Entries, backend, table
from id3_kernels.entries import sort_keys

from ..distributed.blocks import Blocks
from ..param_groups import Piece
from ..pieces import INDEX_BITS
from .layout import Layout, moved
from .tensors import Tensors

_MASKS_KEPT = 64  # patterns of missing gradients
# A recent run of at most this part of the capacity: a larger one costs more at each join, a smaller one is
# merged more often. Of 1/16, 1/32 and 1/64 this is the cheapest (5M entries, 1,700 joining at each step).
RECENT_SHARE = 32


class Shard(Tensors):
    """The active entries of all selectable tensors of one device and dtype, and their state.

    `arrays["indices"]` and the arrays beside it hold the active entries in one or two runs, each in (tensor,
    flat index) order: `offsets` int64 [runs, M + 1], on the device, are those of an active set of the op
    table. The settled run begins at 0. A recent run at the far end of the arrays takes what joins, so that a
    join moves few entries; `settle` merges it into the first when it is full. What lies outside is padding.

    Indices are those of `params`; `blocks` maps them to the whole tensors' where ranks share; `index_bits` is
    how many bits an index has in the places by which entries are compared there.

    `steps` int64 [M] counts the steps in which each tensor had a gradient; `updated_at` int64 [M] is the
    optimizer's step count after the last of them. `n_active`, `column` and `leave` synchronise with a GPU;
    nothing else does.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, layout: Layout):
        super().__init__()
        self.device, self.dtype, self.layout = device, dtype, layout
        if device.type == "cpu" and layout.backend is None and backend.native() is None:
            why = backend.available_backends()["cpu"]
            warnings.warn(f"id3_optim runs its slow reference kernels: {why}", stacklevel=2)
        self.kernels = table.kernels_for(device, layout.backend)
        self.blocks: Blocks | None = None
        self.index_bits = INDEX_BITS
        # Row 0: the settled run's offsets. Row 1: the recent run's, counted from `_begin`, zeros without one.
        self._rows = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self.offsets = self._rows[:1]
        self.steps = torch.zeros(0, dtype=torch.int64, device=device)
        self.updated_at = torch.zeros(0, dtype=torch.int64, device=device)
        self.number_table = torch.zeros(0, dtype=torch.int64, device=device)
        self.limit = 0  # the most entries that may ever be active here
        self.arrays = {
            name: torch.empty(0, dtype=d, device=device) for name, d in layout.arrays(dtype).items()
        }
        self._begin: int | None = None  # where the recent run begins, None without one
        self._recent_count = 0  # how many entries it has at most; a GPU may hold fewer
        self._at_most = 0  # how many entries are active at most
        self._bounds: list[list[int]] | None = None
        self._masks: dict[tuple[bool, ...], Tensor] = {}

    def __getstate__(self) -> dict:
        # Of views a pickle would have the whole memory, and they would be no views after it.
        return {k: v for k, v in self.__dict__.items() if k not in ("kernels", "params")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.params = list(self.owners)
        self.renew()
        if self._begin is None:
            self.offsets = self._rows[:1]
        self.kernels = table.kernels_for(self.device, self.layout.backend)

    def extend(self, added: list[Piece]) -> None:
        """Appends tensors; numbers must ascend. Settles."""
        self.settle()
        super().extend(added)
        # Each table grows once for all rows: a copy per tensor would be quadratic in their number.
        self._rows = torch.cat([self._rows, self._rows[:, -1:].expand(-1, len(added))], 1)
        self.offsets = self._rows[:1]
        numbers = torch.tensor([row.number for row in added], device=self.device)
        self.number_table = torch.cat([self.number_table, numbers])
        self._bounds, self._masks = None, {}
        self.steps = torch.cat([self.steps, torch.zeros_like(numbers)])
        self.updated_at = torch.cat([self.updated_at, torch.zeros_like(numbers)])

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

    def runs(self) -> list[Entries]:
        """The active entries run by run, the offsets of each from 0; values begin where the indices do."""
        indices = self.arrays["indices"]
        settled = Entries(self._rows[0], indices)
        if self._begin is None:
            return [settled]
        return [settled, Entries(self._rows[1], indices[self._begin :])]

    def stretches(self) -> list[slice]:
        """Where in the arrays the active entries lie: on a GPU as far as the host knows, so that more may be
        covered. The same on all replicas."""
        if self.device.type == "cpu":
            return [slice(run[0], run[-1]) for run in self.bounds]
        if self._begin is None:
            return [slice(0, self._at_most)]
        recent = slice(self._begin, self._begin + self._recent_count)
        return [slice(0, min(self._at_most, self._begin)), recent]

    def by_run(self, name: str) -> list[Tensor]:
        """An array beside the indices of each run of `runs`."""
        array = self.arrays[name]
        return [array[array.numel() - run.indices.numel() :] for run in self.runs()]

    def weights(self) -> list[Tensor]:
        """The weights of each run's entries, as AdamW reads them, in the moments' dtype: copies.

        Of a low-precision parameter these are the masters, but where it is no longer its master's rounding.
        """
        stored = [self.kernels.gather(self.params, *run) for run in self.runs()]
        if "master" not in self.arrays:
            return stored
        pairs = zip(stored, self.by_run("master"), strict=True)
        return [torch.where(s == master.to(s.dtype), master, s.to(master.dtype)) for s, master in pairs]

    def parts(self, name: str) -> Sequence[Tensor]:
        """The parts of an array that belong to each tensor, as `column` has them. Settles."""
        self.settle()
        bounds = self.bounds[0]
        return self.arrays[name][: bounds[-1]].split([end - begin for begin, end in pairwise(bounds)])

    def reserve(self, n: int) -> None:
        """Gives the arrays a capacity of at least n entries. Settles where they grow."""
        if self.arrays["indices"].numel() < n:
            self.settle()
        for name, old in self.arrays.items():
            if old.numel() < n:
                # Padding of the gradients must not be NaN: a loss scaler looks at the whole array.
                self.arrays[name] = old.new_zeros(n) if name == "gradient" else old.new_empty(n)
                self.arrays[name][: old.numel()] = old

    def keep_gradients(self, layout: Layout) -> None:
        """Takes a layout with room for the gradients of a step that is not yet taken."""
        self.layout = layout
        wide = self.arrays["exp_avg"]
        self.arrays.setdefault("gradient", torch.zeros_like(wide))

    def _make_room(self, n: int) -> None:
        """Capacity for n entries more; at least doubles, so that many small steps do not copy often."""
        capacity = self.arrays["indices"].numel()
        if capacity < self.limit and self.n_active + n > capacity:
            # Of a split run each rank has about its share from the beginning on: it needs little more.
            larger = 2 * capacity if self.blocks is None else capacity + capacity // 32
            self.reserve(min(max(self.n_active + n, larger), self.limit))

    def join(self, new: Entries, gradient: Tensor | None, at_most: int) -> int:
        """Adds entries that are not active yet, with zero moments (and their gradients, where released).

        at_most: how many entries of all shards are active at most with the new ones, as the host knows.
        Returns which run they have joined. If this fails, out of memory, the active set is what it was.
        """
        n = new.indices.numel()
        self._make_room(n)
        values = self.kernels.gather(self.params, *new)
        first = {"originals": values, "master": values.to(self.arrays["exp_avg"].dtype), "gradient": gradient}
        first = [first.get(name) for name in self.arrays if name != "indices"]
        run = int(self._recent_takes(n))
        arrays = [array[self._begin if run else 0 :] for array in self.arrays.values()]
        self.kernels.join_(arrays, self._rows[run], *new, first)
        if run:  # in place: nothing may fail between the join and its offsets
            torch.add(self._rows[1], self._begin, out=self.offsets[1])
            self._recent_count += n
        self._at_most, self._bounds = max(self._at_most, min(at_most, self.limit)), None
        return run

    def _recent_takes(self, n: int) -> bool:
        """Whether n entries fit into the recent run; settles and opens another one where this one is full."""
        capacity = self.arrays["indices"].numel()
        if self._begin is not None:
            if self._begin + self._recent_count + n <= capacity:
                return True
            self.settle()
        if self.layout.capturable or self.layout.repeat:
            return False  # a graph replays no decision of the host; with "repeat" nothing joins
        if self.device.type == "cpu" or self.blocks is not None:
            self._at_most = self.n_active
        begin = max(capacity - capacity // RECENT_SHARE, self._at_most)
        if n == 0 or begin + n > capacity:
            return False
        offsets = self._rows.clone()
        offsets[1] += begin
        self.offsets, self._begin, self._bounds = offsets, begin, None
        return True

    def settle(self) -> None:
        """Makes one run of two. The active set and its state stay the same."""
        begin = self._begin
        if begin is None:
            return
        arrays = list(self.arrays.values())
        indices, *values = (array[begin:].clone() for array in arrays)  # the merge writes over them
        self.kernels.join_(arrays, self._rows[0], self._rows[1], indices, values)
        self._rows[1].zero_()
        self.offsets, self._begin, self._recent_count, self._bounds = self._rows[:1], None, 0, None
        if "gradient" in self.arrays:
            self._clear_padding(self.arrays["gradient"], begin)

    def _clear_padding(self, gradient: Tensor, begin: int) -> None:
        """Zeros behind the last entry: a loss scaler would find the infinities that an earlier step left."""
        at = torch.arange(begin, gradient.numel(), device=self.device)
        gradient[begin:].masked_fill_(at >= self._rows[0, -1], 0)

    def leave(self, new: Entries, run: int) -> None:
        """Takes back `join(new)`, which has returned `run`, before anything was updated."""
        new = new.trimmed()
        begin, end = self.bounds[run][0], self.bounds[run][-1]
        held = Entries(self._rows[run], self.arrays["indices"][begin:])
        n, n_new = end - begin, new.indices.numel()
        stays = torch.ones(n, dtype=torch.bool, device=self.device)
        stays[torch.searchsorted(sort_keys(held, n), sort_keys(new, n_new))] = False
        for name, array in self.arrays.items():
            array[begin : end - n_new] = array[begin:end][stays]
            if name == "gradient":
                array[end - n_new : end] = 0
        self._rows[run] -= new.offsets
        if run:
            self.offsets[1] -= new.offsets
        self._bounds = None

    def hold(self, offsets: Tensor, n: int, arrays: dict[str, Tensor]) -> None:
        """Makes n other entries the active ones, in one run: offsets [M + 1], all `arrays` that are given."""
        self._rows[0], self._rows[1] = offsets, 0
        self.offsets, self._begin, self._recent_count, self._bounds = self._rows[:1], None, 0, None
        self._at_most = n
        self.arrays |= arrays

    def tables(self) -> list[Tensor]:
        """All tensors with an element per tensor."""
        own = [] if self._begin is None else [self.offsets]
        return [*own, self._rows, self.steps, self.updated_at, self.number_table]

    # --- steps -------------------------------------------------------------------------------------

    def mask(self, present: list[bool]) -> Tensor:
        """bool [M] on the device. Kept, since a CUDA graph cannot hold the copy of a pattern's first use, and
        reads the pattern at each replay."""
        if tuple(present) not in self._masks:
            if len(self._masks) == _MASKS_KEPT and not self.layout.capturable:
                self._masks.clear()
            self._masks[tuple(present)] = moved(torch.tensor(present), self.device)
        return self._masks[tuple(present)]

"""Flat state: what the optimizer keeps per active entry, in one set of arrays per device and dtype."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from id3_kernels import Entries, backend, table
from id3_kernels.checks import LOW_PRECISION
from id3_kernels.entries import sort_keys


@dataclass(frozen=True)
class Layout:
    """Which arrays stand beside the indices and the moments."""

    originals: bool  # the value that an entry had before it joined
    age: bool  # steps since it joined, for bias_correction="entry"
    repeat: bool  # entries may leave: remember every entry that was ever active
    backend: str | None
    release: bool = False  # hooks gather the active entries' gradients: room for them
    capturable: bool = False  # a replayed graph changes the counts, and no Python hears of it

    def columns(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The arrays saved for parameters of `dtype`: name -> dtype, `indices` first."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        columns = {"indices": torch.int32, "exp_avg": wide, "exp_avg_sq": wide}
        if dtype in LOW_PRECISION:
            columns["master"] = wide
        if self.originals and not self.repeat:
            columns["originals"] = dtype
        if self.age:
            columns["age"] = torch.int32
        return columns

    def arrays(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The arrays kept: those saved, and the gradients of a step that is not yet taken."""
        columns = self.columns(dtype)
        return columns | ({"gradient": columns["exp_avg"]} if self.release else {})


class Slice(NamedTuple):
    """The tensors first:last of a shard, which all belong to param group `group`."""

    group: int
    first: int
    last: int


class Shard:
    """The state of all selectable tensors of one device and dtype.

    `arrays["indices"]` and its companions have room for `capacity` entries and hold the active ones in
    (tensor, flat index) order; `offsets` int64 [M + 1], on the device, says which are whose. `steps` int64
    [M] counts the steps in which each tensor had a gradient; `updated_at` int64 [M] is how many steps of the
    optimizer were done after the last of them. With released gradients, `seen[j]` says whether tensor j had
    one since the last step; its part of `arrays["gradient"]` holds it.

    What asks a GPU for a number: `bounds`, `n_active`, `replace`, `leave`, `touched`, `cut` and `load`.
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
        self.seen: list[bool] = []
        self.numel = 0
        self.limit = 0  # the most entries that may ever be active here
        self.arrays = {
            name: torch.empty(0, dtype=d, device=device) for name, d in layout.arrays(dtype).items()
        }
        self._bounds: list[int] | None = None
        self._masks: dict[tuple[bool, ...], Tensor] = {}
        self.ever: Entries | None = None
        self.ever_originals: Tensor | None = None

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "kernels"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.kernels = table.kernels_for(self.device, self.layout.backend)

    # --- tensors -----------------------------------------------------------------------------------

    def add(self, param: Tensor, position: int, group: int) -> None:
        """Appends a tensor; positions must rise."""
        self.params.append(param)
        self.positions.append(position)
        n = len(self.params)
        if self.slices and self.slices[-1].group == group:
            self.slices[-1] = self.slices[-1]._replace(last=n)
        else:
            self.slices.append(Slice(group, n - 1, n))
        self.numel += param.numel()
        self.seen.append(False)
        self.offsets = torch.cat([self.offsets, self.offsets[-1:]])
        self.position_table = torch.tensor(self.positions, device=self.device)
        self._bounds, self._masks = None, {}
        self.steps = torch.cat([self.steps, self.steps.new_zeros(1)])
        self.updated_at = torch.cat([self.updated_at, self.updated_at.new_zeros(1)])
        if self.layout.repeat:
            before = self.ever or Entries.empty(n - 1, self.device)
            self.ever = Entries(torch.cat([before.offsets, before.offsets[-1:]]), before.indices)
            if self.layout.originals and self.ever_originals is None:
                self.ever_originals = torch.empty(0, dtype=self.dtype, device=self.device)

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
        """The active entries; `indices` is longer than there are."""
        return Entries(self.offsets, self.arrays["indices"])

    def reserve(self, n: int) -> None:
        """Makes the arrays hold n entries at least."""
        for name, old in self.arrays.items():
            if old.numel() < n:
                # What no hook has written must not be NaN: a loss scaler looks at all of the accumulator.
                self.arrays[name] = old.new_zeros(n) if name == "gradient" else old.new_empty(n)
                self.arrays[name][: old.numel()] = old

    def make_room(self, n: int) -> None:
        """Room for n entries more; at least doubles, so that many small steps do not copy often."""
        capacity = self.arrays["indices"].numel()
        if capacity < self.limit and self.n_active + n > capacity:
            self.reserve(min(max(self.n_active + n, 2 * capacity), self.limit))

    def join(self, new: Entries, gradient: Tensor | None = None) -> None:
        """Adds entries that are not active yet, with zero moments (and their gradients, where released)."""
        self.make_room(new.indices.numel())
        values = self.kernels.gather(self.params, *new)
        first = {"originals": values, "master": values.to(self.arrays["exp_avg"].dtype), "gradient": gradient}
        names, arrays = zip(*self.arrays.items(), strict=True)
        self.kernels.join_(list(arrays), self.offsets, *new, [first.get(name) for name in names[1:]])
        self._bounds = None

    def leave(self, new: Entries) -> None:
        """Takes back `join(new)`, before anything was updated. Waits for a GPU."""
        new = new.trimmed()
        n = self.n_active
        stays = torch.ones(n, dtype=torch.bool, device=self.device)
        n_new = new.indices.numel()
        stays[torch.searchsorted(sort_keys(self.active, n), sort_keys(new, n_new))] = False
        for array in self.arrays.values():
            array[: n - n_new] = array[:n][stays]
        self.offsets -= new.offsets
        self._bounds = None

    def replace(self, new: Entries) -> None:
        """Makes `new` the active set (strategy repeat): who stays keeps its state, who leaves drops it."""
        new = new.trimmed()
        _, held_at, new_at = self.kernels.union(*self.active.trimmed(), *new)[1:]
        n_union = self.n_active + new.indices.numel()
        values = self.kernels.gather(self.params, *new)
        fresh = {"master": values.to(torch.float32), "indices": new.indices}
        self._remember(new, values)
        n_old, n_new = self.n_active, new.indices.numel()
        self.offsets, self._bounds = new.offsets.clone(), None
        stayed = torch.zeros(n_union, dtype=torch.bool, device=self.device)
        stayed[held_at] = True
        for name, array in self.arrays.items():
            carried = array.new_zeros(n_union)
            carried[held_at] = array[:n_old]
            self.arrays[name] = array.new_empty(max(array.numel(), n_new))
            row = carried[new_at]
            self.arrays[name][:n_new] = (
                torch.where(stayed[new_at], row, fresh[name]) if name in fresh else row
            )

    def _remember(self, new: Entries, values: Tensor) -> None:
        """Adds `new` to the entries that were ever active, with the values they had before."""
        offsets, indices, held_at, new_at = self.kernels.union(*self.ever, *new)
        self.ever = Entries(offsets, indices).trimmed()
        if self.ever_originals is not None:
            originals = values.new_empty(self.ever.indices.numel())
            originals[new_at] = values
            originals[held_at] = self.ever_originals  # who was active before keeps its first value
            self.ever_originals = originals

    def touched(self, j: int) -> tuple[Tensor, Tensor | None]:
        """(indices, originals) of the entries of tensor j that training may have changed."""
        if self.layout.repeat:
            begin, end = self.ever.offsets[j : j + 2].tolist()
            indices, originals = self.ever.indices, self.ever_originals
        else:
            begin, end = self.bounds[j : j + 2]
            indices, originals = self.arrays["indices"], self.arrays.get("originals")
        return indices[begin:end], None if originals is None else originals[begin:end]

    # --- update ------------------------------------------------------------------------------------

    def count_step(
        self, grads: list[Tensor | None] | None, number: int | Tensor, fine: Tensor | None
    ) -> None:
        """Counts the optimizer's step `number` (the first is 1) for every tensor that has a gradient.

        grads None: the released ones. fine: bool [1], False where an overflow stops the step.
        """
        present = self.seen if grads is None else [g is not None for g in grads]
        counted = None if all(present) else self._mask(present)
        if fine is not None:
            counted = fine if counted is None else counted & fine
        if counted is None:
            self.steps += 1
            self.updated_at.copy_(number) if isinstance(number, Tensor) else self.updated_at.fill_(number)
        else:
            self.steps += counted
            self.updated_at.copy_(torch.where(counted, number, self.updated_at))

    def _mask(self, present: list[bool]) -> Tensor:
        """bool [M] on the device. Kept: the copy, at a pattern's first time, is what a graph can not hold."""
        if tuple(present) not in self._masks:
            if len(self._masks) == 64:
                self._masks.clear()
            self._masks[tuple(present)] = moved(torch.tensor(present), self.device)
        return self._masks[tuple(present)]

    def released(self) -> Tensor:
        """[capacity] the released gradients of the active entries; 0 for a tensor that had none."""
        values = self.arrays["gradient"]
        if not all(self.seen):
            at = torch.arange(values.numel(), device=self.device)
            owner = torch.searchsorted(self.offsets[1:], at, right=True).clamp_(max=len(self.seen) - 1)
            self.arrays["gradient"] = torch.where(self._mask(self.seen)[owner], values, 0)
        return self.arrays["gradient"]

    def squared_norm(self, grads: list[Tensor | None] | None) -> Tensor:
        """float64 []: the sum of squares of the active entries' gradients. None: the released ones."""
        if grads is not None:
            return self.kernels.squared_norm(grads, *self.active)
        values = self.released()
        ends = torch.stack([self.offsets[0], self.offsets[-1]])
        everything = torch.arange(values.numel(), dtype=torch.int32, device=self.device)
        return self.kernels.squared_norm([values], ends, everything)

    def update(self, part: Slice, grads: list[Tensor | None] | None, *numbers: Any) -> None:
        """One AdamW step on the active entries of one param group: one call for all its tensors.

        grads None: the released ones, one call for each run of tensors that have one. numbers: the op's
        arguments behind `step`.
        """
        _, i, j = part
        if grads is not None:
            self._update(self.kernels.adamw_, i, j, grads[i:j], numbers)
            return
        for first, last in self._seen_runs(i, j):
            self._update(self.kernels.adamw_compact_, first, last, self.arrays["gradient"], numbers)

    def _update(self, adamw_, first: int, last: int, gradient, numbers: tuple) -> None:
        state = [self.arrays.get(name) for name in ("exp_avg", "exp_avg_sq", "master", "age")]
        adamw_(
            self.params[first:last],
            gradient,
            self.offsets[first : last + 1],
            self.arrays["indices"],
            *state,
            self.steps[first:last] + 1,  # counted when all groups are done, so that a step that fails is not
            *numbers,
        )
        torch.autograd.graph.increment_version(self.params[first:last])

    def _seen_runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """The longest runs of neighbours among the tensors first:last that had a gradient."""
        edges = [j for j in range(first, last) if self.seen[j] != (j > first and self.seen[j - 1])]
        edges += [last] if last > first and self.seen[last - 1] else []
        return list(zip(edges[::2], edges[1::2], strict=True))

    # --- state_dict --------------------------------------------------------------------------------

    def cut(self, j: int) -> dict:
        """The state of tensor j as torch's per-parameter dict: copies, so that later steps leave it alone."""
        begin, end = self.bounds[j : j + 2]
        saved = self.layout.columns(self.dtype)
        state = {name: self.arrays[name][begin:end].clone() for name in saved}
        state |= {"step": self.steps[j].clone(), "shape": list(self.params[j].shape)}
        if self.layout.repeat:
            indices, originals = self.touched(j)
            state["ever_indices"] = indices.clone()
            if originals is not None:
                state["ever_originals"] = originals.clone()
        return state

    def load(self, states: list[dict], steps_done: int) -> None:
        """Takes over the per-parameter dicts of `cut`, one per tensor, in order, of an optimizer's state."""
        self._bounds = _bounds([s["indices"] for s in states])
        self.offsets = torch.tensor(self._bounds, dtype=torch.int64, device=self.device)
        self.steps = torch.tensor([int(s["step"]) for s in states], dtype=torch.int64, device=self.device)
        self.updated_at.fill_(steps_done)  # not stored: changed_since errs on the side of too much
        self.reserve(self._bounds[-1])
        for name in self.arrays:
            if name not in self.layout.columns(self.dtype):
                continue
            for s, (begin, end) in zip(states, pairwise(self._bounds), strict=True):
                self.arrays[name][begin:end] = s[name]
        if self.layout.repeat:
            # A state of another strategy (strict=False) has no memory of entries that left: none has.
            rows = [s.get("ever_indices", s["indices"]).to(self.device) for s in states]
            self.ever = Entries(torch.tensor(_bounds(rows), device=self.device), torch.cat(rows))
            if self.layout.originals:
                before = [s["ever_originals" if "ever_originals" in s else "originals"] for s in states]
                self.ever_originals = torch.cat([values.to(self.device) for values in before])


def _bounds(rows: list[Tensor]) -> list[int]:
    bounds = [0]
    for row in rows:
        bounds.append(bounds[-1] + row.numel())
    return bounds


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; nobody waits but the CPU, which would read what has not arrived yet."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def trainable_entries(param_groups: list[dict]) -> int:
    """N: the entries of all parameters that train and are in no dense group."""
    selectable = (p for group in param_groups if not group["dense"] for p in group["params"])
    return sum(p.numel() for p in selectable if p.requires_grad)

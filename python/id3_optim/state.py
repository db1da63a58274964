"""Flat state: what the optimizer keeps per active entry, in one set of arrays per device and dtype."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from id3_kernels import Entries, backend
from id3_kernels.checks import LOW_PRECISION


@dataclass(frozen=True)
class Layout:
    """Which arrays stand beside the indices and the moments."""

    originals: bool  # the value that an entry had before it joined
    age: bool  # steps since it joined, for bias_correction="entry"
    repeat: bool  # entries may leave: remember every entry that was ever active
    backend: str | None
    release: bool = False  # hooks gather the active entries' gradients: room for them

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
    (tensor, flat index) order; `offsets` int64 [M + 1] says which are whose, `bounds` is its host copy.
    `steps` int64 [M] counts the steps in which each tensor had a gradient; `updated_at` int64 [M], on the
    host, is how many steps of the optimizer were done after the last of them. With released gradients,
    `seen[j]` says whether tensor j had one since the last step; its part of `arrays["gradient"]` holds it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, layout: Layout):
        self.device, self.dtype, self.layout = device, dtype, layout
        if device.type == "cpu" and layout.backend is None and backend.native() is None:
            why = backend.available_backends()["cpu"]
            warnings.warn(f"id3_optim runs its slow reference kernels: {why}", stacklevel=2)
        self.kernels = backend.kernels_for(device, layout.backend)
        self.params: list[Tensor] = []
        self.positions: list[int] = []
        self.slices: list[Slice] = []
        self.offsets = torch.zeros(1, dtype=torch.int64, device=device)
        self.bounds = [0]
        self.steps = torch.zeros(0, dtype=torch.int64, device=device)
        self.updated_at = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.seen: list[bool] = []
        self.arrays = {
            name: torch.empty(0, dtype=d, device=device) for name, d in layout.arrays(dtype).items()
        }
        self.ever: Entries | None = None
        self.ever_originals: Tensor | None = None

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "kernels"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.kernels = backend.kernels_for(self.device, self.layout.backend)

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
        self.bounds.append(self.bounds[-1])
        self.seen.append(False)
        self.offsets = torch.cat([self.offsets, self.offsets[-1:]])
        self.steps = torch.cat([self.steps, self.steps.new_zeros(1)])
        self.updated_at = torch.cat([self.updated_at, self.updated_at.new_zeros(1)])
        if self.layout.repeat:
            before = self.ever or Entries.empty(n - 1, self.device)
            self.ever = Entries(torch.cat([before.offsets, before.offsets[-1:]]), before.indices)
            if self.layout.originals and self.ever_originals is None:
                self.ever_originals = torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    # --- entries -----------------------------------------------------------------------------------

    @property
    def n_active(self) -> int:
        return self.bounds[-1]

    @property
    def active(self) -> Entries:
        return Entries(self.offsets, self.arrays["indices"][: self.n_active])

    def reserve(self, n: int) -> None:
        """Makes room for n entries; at least doubles, so that many small steps do not copy often."""
        capacity = self.arrays["indices"].numel()
        if n <= capacity:
            return
        capacity = max(n, min(2 * capacity, self.numel))
        for name, old in self.arrays.items():
            self.arrays[name] = old.new_empty(capacity)
            self.arrays[name][: self.n_active] = old[: self.n_active]

    def join(self, new: Entries, gradient: Tensor | None = None) -> None:
        """Adds entries that are not active yet, with zero moments (and their gradients, where released)."""
        self.reserve(self.n_active + new.indices.numel())
        where = self.kernels.join_(list(self.arrays.values()), self.offsets, *new)
        values = self.kernels.gather(self.params, *new)
        for name in ("originals", "master"):
            if name in self.arrays:
                self.arrays[name][where] = values.to(self.arrays[name].dtype)
        if gradient is not None:
            self.arrays["gradient"][where] = gradient
        self.bounds = self.offsets.tolist()

    def replace(self, new: Entries) -> None:
        """Makes `new` the active set (strategy repeat): who stays keeps its state, who leaves drops it."""
        _, held_at, new_at = self.kernels.union(*self.active, *new)[1:]
        n_union = self.n_active + new.indices.numel()
        values = self.kernels.gather(self.params, *new)
        fresh = {"master": values.to(torch.float32), "indices": new.indices}
        self._remember(new, values)
        n_old, n_new = self.n_active, new.indices.numel()
        self.offsets, self.bounds = new.offsets.clone(), new.offsets.tolist()
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

    def count_step(self, grads: list[Tensor | None] | None, number: int) -> None:
        """Counts the optimizer's step `number` (the first is 1) for every tensor that has a gradient.

        grads None: the released ones.
        """
        present = self.seen if grads is None else [g is not None for g in grads]
        if all(present):
            self.steps += 1
            self.updated_at.fill_(number)
        else:
            has_gradient = torch.tensor(present, device="cpu")
            self.steps += has_gradient.to(self.device)
            self.updated_at[has_gradient] = number

    def squared_norm(self, grads: list[Tensor | None] | None) -> Tensor:
        """float64 []: the sum of squares of the active entries' gradients. None: the released ones."""
        if grads is not None:
            return self.kernels.squared_norm(grads, *self.active)
        values = self.arrays["gradient"][: self.n_active]
        for j, (begin, end) in enumerate(pairwise(self.bounds)):
            if not self.seen[j]:
                values[begin:end] = 0
        offsets = torch.zeros(2, dtype=torch.int64, device=self.device)
        offsets[1:].fill_(self.n_active)
        everything = torch.arange(self.n_active, dtype=torch.int32, device=self.device)
        return self.kernels.squared_norm([values], offsets, everything)

    def update(
        self, part: Slice, grads: list[Tensor | None] | None, numbers: tuple, maximize: bool, scalars: tuple
    ):
        """One AdamW step on the active entries of one param group: one call for all its tensors.

        grads None: the released ones, one call for each run of tensors that have one.
        """
        _, i, j = part
        if grads is not None:
            self._update(self.kernels.adamw_, i, j, grads[i:j], numbers, maximize, scalars)
            return
        for first, last in self._seen_runs(i, j):
            values = self.arrays["gradient"][self.bounds[first] : self.bounds[last]]
            self._update(self.kernels.adamw_compact_, first, last, values, numbers, maximize, scalars)

    def _update(self, adamw_, first: int, last: int, gradient, numbers, maximize, scalars) -> None:
        begin, end = self.bounds[first], self.bounds[last]
        if begin == end:
            return
        rows = {name: array[begin:end] for name, array in self.arrays.items()}
        state = [rows.get(name) for name in ("exp_avg", "exp_avg_sq", "master", "age")]
        adamw_(
            self.params[first:last],
            gradient,
            self.offsets[first : last + 1] - begin,
            rows["indices"],
            *state,
            self.steps[first:last],
            *numbers,
            maximize,
            *scalars,
        )
        torch.autograd.graph.increment_version(self.params[first:last])

    def _seen_runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """The longest runs of neighbours among the tensors first:last that had a gradient."""
        edges = [j for j in range(first, last) if self.seen[j] != (j > first and self.seen[j - 1])]
        edges += [last] if last > first and self.seen[last - 1] else []
        return list(zip(edges[::2], edges[1::2], strict=True))

    def seen_rows(self) -> list[tuple[int, int]]:
        """Where in `arrays["gradient"]` released gradients stand, as [begin, end) pairs."""
        runs = self._seen_runs(0, len(self.params))
        return [(self.bounds[first], self.bounds[last]) for first, last in runs]

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
        self.bounds = _bounds([s["indices"] for s in states])
        self.offsets = torch.tensor(self.bounds, dtype=torch.int64, device=self.device)
        self.steps = torch.tensor([int(s["step"]) for s in states], dtype=torch.int64, device=self.device)
        self.updated_at.fill_(steps_done)  # not stored: changed_since errs on the side of too much
        for name, array in self.arrays.items():
            self.arrays[name] = array.new_empty(max(array.numel(), self.n_active))
            if name not in self.layout.columns(self.dtype):
                continue
            for s, (begin, end) in zip(states, pairwise(self.bounds), strict=True):
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


def trainable_entries(param_groups: list[dict]) -> int:
    """N: the entries of all parameters that train and are in no dense group."""
    selectable = (p for group in param_groups if not group["dense"] for p in group["params"])
    return sum(p.numel() for p in selectable if p.requires_grad)

"""The arguments of one AdamW call as an object, so that the same call can be made again on a copy."""

from __future__ import annotations

from dataclasses import dataclass

import cases
import numpy as np
import torch
from torch import Tensor

import id3_kernels
from id3_kernels import Entries

NUMBERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def copy(value, device):
    """A copy with the same strides, gaps and offset in memory."""
    if not isinstance(value, Tensor):
        return value
    memory = torch.empty(0, dtype=value.dtype).set_(value.detach().cpu().untyped_storage().clone())
    return memory.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


@dataclass
class Update:
    params: list[Tensor]
    grads: list[Tensor | None]
    entries: Entries
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    age: Tensor | None
    step: int | Tensor = 1

    @property
    def count(self) -> int:
        return int(self.entries.offsets[-1])

    @classmethod
    def fresh(cls, params, entries: Entries, with_master=False, with_age=False, capacity=0) -> Update:
        """Zero moments, masters equal to the parameters, ages 0; junk in `capacity` more elements."""
        wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        held = [p.reshape(-1)[i.long()].to(wide) for p, i in zip(params, entries.lists(), strict=True)]
        junk = torch.full((capacity,), 7.0, dtype=wide)
        master = torch.cat([*held, junk])
        moments = [torch.cat([torch.zeros(len(master) - capacity, dtype=wide), junk]) for _ in range(2)]
        age = torch.zeros(len(master), dtype=torch.int32) if with_age else None
        return cls(params, [None] * len(params), entries, *moments, master if with_master else None, age)

    @classmethod
    def of(cls, problem: cases.Problem, seed: int, with_master: bool, with_age: bool) -> Update:
        """State of a run in progress: every third master is stale."""
        rng = np.random.default_rng(seed)
        entries = problem.active or cases.some_entries(problem.sizes(), 0.3, rng)
        update = cls.fresh(problem.params, entries, with_master, with_age, capacity=3)
        update.grads = problem.grads
        update.exp_avg.copy_(torch.from_numpy(rng.standard_normal(update.exp_avg.numel())))
        update.exp_avg_sq.copy_(torch.from_numpy(rng.standard_normal(update.exp_avg.numel()) ** 2))
        if with_master:
            update.master[::3] += 1.0
        if with_age:
            update.age.copy_(torch.from_numpy(rng.integers(0, 2000, len(update.age))))
        update.step = torch.from_numpy(rng.integers(1, 5000, len(problem.params)))
        return update

    def clone(self, device="cpu") -> Update:
        lists = ([copy(t, device) for t in tensors] for tensors in (self.params, self.grads))
        rest = (self.exp_avg, self.exp_avg_sq, self.master, self.age, self.step)
        entries = Entries(*(copy(t, device) for t in self.entries))
        return Update(*lists, entries, *(copy(t, device) for t in rest))

    def part(self, first: int, last: int) -> Update:
        """The update of the tensors first .. last alone, on copies of what is theirs."""
        begin, end = self.entries.offsets[[first, last]].tolist()
        entries = Entries.from_lists(self.entries.lists()[first:last], self.entries.offsets.device)
        vectors = (self.exp_avg, self.exp_avg_sq, self.master, self.age)
        state = (None if t is None else t[begin:end].clone() for t in vectors)
        return Update(self.params[first:last], self.grads[first:last], entries, *state, self.step[first:last])


def run(backend: str, u: Update, *, compact=False, maximize=False, **options) -> Update:
    """Calls adamw_, or with `compact` adamw_compact_ on gathered gradients; changes and returns u."""
    device = u.params[0].device
    numbers = {name: options.pop(name, value) for name, value in NUMBERS.items()}
    scalars = {name: None if x is None else torch.tensor([x], device=device) for name, x in options.items()}
    arguments = {"step": u.step, "age": u.age, "maximize": maximize, **numbers, **scalars}
    with id3_kernels.use_backend(backend):
        if compact:
            wide = u.exp_avg.dtype
            rows = zip(u.params, u.grads, u.entries.lists(), strict=True)
            gathered = [
                (torch.ones_like(p) if g is None else g).reshape(-1)[i.long()].to(wide) for p, g, i in rows
            ]
            state = (u.entries, u.exp_avg, u.exp_avg_sq, u.master)
            id3_kernels.adamw_compact_(u.params, torch.cat(gathered), *state, **arguments)
        else:
            state = (u.entries, u.exp_avg, u.exp_avg_sq, u.master)
            id3_kernels.adamw_(u.params, u.grads, *state, **arguments)
    return u

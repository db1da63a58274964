"""The gradients of one step, shard by shard: whole, as autograd left them, or what hooks kept of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from id3_kernels import checks, reference
from id3_kernels.entries import owners

from ..distributed.norm import sums_of_squares
from ..distributed.part import local, local_gradient
from ..param_groups import members
from ..state.active_set import ActiveSet
from ..state.shard import Shard
from ..state.tensors import Slice
from ..validation import check_memory
from .warmup import count_ages


class Whole:
    """The gradients of a shard's tensors, None where a tensor has none."""

    def __init__(self, tensors: list[Tensor | None]):
        self.tensors = tensors

    def present(self) -> list[bool]:
        """Which tensors have a gradient."""
        return [g is not None for g in self.tensors]

    def squared_norm(self, shard: Shard) -> Tensor:
        """float64 []: the sum of squares at the active entries."""
        return shard.kernels.squared_norm(self.tensors, shard.offsets, shard.arrays["indices"])

    def own_values(self, shard: Shard) -> Tensor:
        """The gradients of those active entries that this rank speaks for, and zeros."""
        tensors = [p if g is None else g for p, g in zip(shard.params, self.tensors, strict=True)]
        gather = shard.kernels.gather if len({t.dtype for t in tensors}) == 1 else reference.gather
        rows = [gather(tensors, *run) for run in shard.runs()]
        return _own(shard, rows, self.present())

    def update(self, shard: Shard, part: Slice, arguments: tuple) -> None:
        """One AdamW step on the active entries of one param group: one call for all its tensors.

        arguments: those of the op that follow `step`.
        """
        _, first, last = part
        _adamw(shard.kernels.adamw_, shard, first, last, self.tensors[first:last], arguments)


class Kept:
    """What hooks kept since the last step: the values at active entries, in the shard's `gradient` array.

    seen[j]: whether tensor j had a gradient, so that its part of the array holds it.
    """

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def cover(self, n_tensors: int) -> None:
        """Covers n_tensors tensors; those that are new had no gradient yet."""
        self.seen += [False] * (n_tensors - len(self.seen))

    def present(self) -> list[bool]:
        return list(self.seen)

    def values(self, shard: Shard) -> Tensor:
        """[capacity] the gradients of the active entries; 0 for a tensor that had none."""
        values = shard.arrays["gradient"]
        if not all(self.seen):
            at, keep = torch.arange(values.numel(), device=shard.device), None
            for run in shard.offsets:
                owner = torch.searchsorted(run[1:], at, right=True).clamp_(max=len(self.seen) - 1)
                inside = (at >= run[0]) & (at < run[-1]) & shard.mask(self.seen)[owner]
                keep = inside if keep is None else keep | inside
            shard.arrays["gradient"] = torch.where(keep, values, 0)
        return shard.arrays["gradient"]

    def squared_norm(self, shard: Shard) -> Tensor:
        values = self.values(shard)
        ends = torch.stack([shard.offsets[:, 0], shard.offsets[:, -1]], 1)
        everything = torch.arange(values.numel(), dtype=torch.int32, device=shard.device)
        return shard.kernels.squared_norm([values], ends, everything)

    def own_values(self, shard: Shard) -> Tensor:
        """As `Whole.own_values`."""
        return _own(shard, shard.by_run("gradient"), self.present())

    def update(self, shard: Shard, part: Slice, arguments: tuple) -> None:
        """As `Whole.update`, with one call for each stretch of neighbours that have a gradient."""
        _, first, last = part
        seen, values = self.seen, shard.arrays["gradient"]
        edges = [j for j in range(first, last) if seen[j] != (j > first and seen[j - 1])]
        edges += [last] if last > first and seen[last - 1] else []
        for i, j in zip(edges[::2], edges[1::2], strict=True):
            _adamw(shard.kernels.adamw_compact_, shard, i, j, values, arguments)


def _own(shard: Shard, rows: list[Tensor], present: list[bool]) -> Tensor:
    """The values of each run of the active entries, 0 for padding and where tensors are missing or another
    rank speaks for them."""
    counts, found = shard.mask(present) & shard.blocks.first, []
    for run, values in zip(shard.runs(), rows, strict=True):
        owner = owners(run, values.numel()).clamp_(max=counts.numel() - 1)
        held = torch.arange(values.numel(), device=shard.device) < run.offsets[-1]
        found.append(torch.where(held & counts[owner], values, 0))
    return torch.cat(found)


def _adamw(op, shard: Shard, first: int, last: int, gradient, arguments: tuple) -> None:
    """One call of an AdamW op for the tensors first:last of a shard."""
    names = ("exp_avg", "exp_avg_sq", "master", "age" if shard.layout.age_corrects else None)
    state = [shard.arrays.get(name) for name in names]
    op(
        shard.params[first:last],
        gradient,
        shard.offsets[:, first : last + 1],
        shard.arrays["indices"],
        *state,
        shard.steps[first:last] + 1,  # counted when all groups are done, so that a step that fails is not
        *arguments,
    )
    torch.autograd.graph.increment_version(shard.owners[first:last])


def counted(gradients: Whole | Kept, shard: Shard, not_overflowed: Tensor | None) -> Tensor | None:
    """bool [M] or [1]: which tensors of the shard a step updates, those with a gradient; None for all.

    not_overflowed: bool [1], False where an overflow stops the step; None for no overflow.
    """
    present = gradients.present()
    if all(present):
        return not_overflowed
    return shard.mask(present) if not_overflowed is None else shard.mask(present) & not_overflowed


def count(shard: Shard, number: int | Tensor, counted: Tensor | None) -> None:
    """Counts the optimizer's step `number` (the first is 1) for the tensors that `counted` names, and the
    ages of their entries unless the op has."""
    if shard.layout.age and not shard.layout.age_corrects:
        count_ages(shard, counted)
    if counted is None:
        shard.steps += 1
        shard.updated_at.copy_(number) if isinstance(number, Tensor) else shard.updated_at.fill_(number)
    else:
        shard.steps += counted
        shard.updated_at.copy_(torch.where(counted, number, shard.updated_at))


def squared_norms(
    active: ActiveSet, gradients: list[Whole] | list[Kept], groups: list[dict[str, Any]]
) -> list[Tensor]:
    """float64 [] for each shard, of its active entries, and for each gradient of a dense group."""
    pairs = list(zip(gradients, active.shards, strict=True))
    dense = [p for g in groups if g["dense"] for p in g["params"] if p.grad is not None]
    if active.ranks.alone:
        squares = [g.squared_norm(shard) for g, shard in pairs]
        norms = [torch.linalg.vector_norm(local_gradient(p), dtype=torch.float64) for p in dense]
        return squares + [norm.square() for norm in norms]
    values = [g.own_values(shard) for g, shard in pairs]
    for p in dense:
        values.append(local_gradient(p).reshape(-1) if active.ranks.speaks_for(p) else local(p).new_empty(0))
    return sums_of_squares(active.ranks, values)


def of_step(active: ActiveSet, groups: list[dict[str, Any]]) -> list[Whole]:
    """The gradients per shard. Raises ValueError if one, of a dense group too, does not fit its parameter."""
    whole = []
    for shard in active.shards:
        if shard.split:
            shard.renew()
        whole.append(Whole(shard.gradients() if shard.split else [p.grad for p in shard.owners]))
    for shard, gradients in zip(active.shards, whole, strict=True):
        if not _plain(shard, gradients.tensors):
            for j, gradient in enumerate(gradients.tensors):
                check(active, shard, j, gradient)
            shard.strides = [p.stride() for p in shard.params]
    if any(group["dense"] for group in groups):
        check_dense(active, groups)
    return whole


def check_dense(active: ActiveSet, groups: list[dict[str, Any]]) -> None:
    """Raises ValueError where the gradient of a parameter in a dense group does not fit it."""
    for position, _, param in members(groups, dense=True):
        _check_gradient(active.name(position), local(param), local_gradient(param))


def check(active: ActiveSet, shard: Shard, j: int, gradient: Tensor | None) -> None:
    """Raises ValueError for a gradient of tensor j that the kernels cannot take, and for a parameter whose
    device, dtype or shape has changed since the first step, or whose entries share memory."""
    param, name = shard.params[j], active.name(shard.positions[j])
    if param.dtype != shard.dtype or param.device != shard.device:
        expected, got = f"{shard.dtype} on {shard.device}", f"{param.dtype} on {param.device}"
        raise ValueError(f"{name}: expected {expected} as at the first step, got {got}")
    if (shape := local(shard.owners[j]).shape) != shard.shapes[j]:
        expected, got = tuple(shard.shapes[j]), tuple(shape)
        raise ValueError(f"{name}: expected shape {expected} as at the first step, got {got}")
    check_memory(name, param)
    _check_gradient(name, param, gradient)


def _check_gradient(name: str, param: Tensor, g: Tensor | None) -> None:
    if g is not None and (g.dtype != param.dtype or g.layout != torch.strided):
        checks.gradient(f"gradient of {name}", g, param)


def _plain(shard: Shard, grads: list[Tensor | None]) -> bool:
    """Whether no tensor needs a check of its own. Sets take a fifth of the time of single checks.

    Another shape of as many entries has other strides, and so have expanded tensors. Reading the number of a
    device takes half the time of reading the device.
    """
    given = [g for g in grads if g is not None]
    return (
        {p.dtype for p in shard.params} == {shard.dtype}
        and set(map(Tensor.get_device, shard.params)) == {shard.steps.get_device()}
        and list(map(Tensor.stride, shard.params)) == shard.strides
        and {g.dtype for g in given} <= {shard.dtype}
        and {g.layout for g in given} <= {torch.strided}
    )

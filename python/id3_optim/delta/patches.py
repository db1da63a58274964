"""A delta's entries in a live model: found by name, checked, read and written in O(entries)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import id3_kernels
from id3_kernels import Entries

from ..distributed.part import block_of, check_part, full, is_split, local
from ..pieces import cut
from ..wrappers import plain_parameters
from .coordinates import Part, checkpoint_parts, part_views, parts_of_split
from .file import VALUE_DTYPES, Change, DeltaError
from .fingerprint import by_kind, first_difference
from .split import read_split, write_split
from .values import rounded


class Patch(NamedTuple):
    """Values of a parameter: at flat indices (int32 [n], int64 where it has pieces), or of all of it when
    indices is None."""

    param: Tensor
    indices: Tensor | None
    values: Tensor


class Difference(NamedTuple):
    """An entry of a parameter whose bits are not the expected ones. index: flat."""

    name: str
    index: int
    expected: float
    held: float


def check_param(name: str, param: Tensor) -> None:
    """Raises DeltaError for a tensor that a delta cannot hold."""
    if is_split(param):
        check_part(name, param)
        param = local(param)
    kind = type(param).__name__ if type(param) not in (Tensor, nn.Parameter) else param.layout
    if kind is torch.strided and param.dtype not in VALUE_DTYPES:
        kind = param.dtype
    if kind is not torch.strided:
        raise DeltaError(f"{name}: expected a plain dense tensor, got {kind}, which is not supported")
    if param.is_meta:
        raise DeltaError(f"{name}: expected a tensor with values, got one on the meta device")


def find(
    model: nn.Module, changes: Mapping[str, Change], strict: bool, cast: bool = False
) -> dict[str, Patch]:
    """The parameter and the new values of each change, all checked; strict=False omits missing names.

    A name that is no parameter's may be that of a weight of the model's checkpoint, a part of a parameter.
    cast: the values are rounded to the parameters' dtypes, which may differ from the delta's.
    """
    present, split = plain_parameters(model), {}
    if not changes.keys() <= present.keys():
        parts = checkpoint_parts(model)
        _check_apart(parts, changes)
        split = parts_of_split(model, parts)
        split = {name: split[name] for name in changes if name in split and name not in present}
        present = part_views(model, parts) | present
    placed = find_in(present, {n: c for n, c in changes.items() if n not in split}, strict, cast, not split)
    placed |= {n: _in_split(*split[n], change, cast) for n, change in changes.items() if n in split}
    return {name: placed[name] for name in changes if name in placed}


def _check_apart(parts: Mapping[str, list[Part]], changes: Mapping[str, Change]) -> None:
    """Raises DeltaError for changes of a parameter and of its part, which would overwrite each other."""
    for name, own in parts.items():
        part = next((part.name for part in own if part.name in changes and part.name != name), None)
        if name in changes and part is not None:
            raise DeltaError(
                f"{part}: expected changes of the checkpoint's weights alone, got those of {name}, "
                "which holds it, too; merge deltas of one form"
            )


def _in_split(part: Part, param: Tensor, change: Change, cast: bool) -> Patch:
    """A patch of the DTensor that a weight of the checkpoint is a part of."""
    check_param(part.name, param)
    _check_alike(part.name, part.shape, param.dtype, change, cast)
    if change.indices is None:
        raise DeltaError(f"{part.name}: expected entries of a DTensor's part, got a whole weight")
    return Patch(param, part.places(change.indices), rounded(change.values, param.dtype))


def find_in(
    present: Mapping[str, Tensor],
    changes: Mapping[str, Change],
    strict: bool = True,
    cast: bool = False,
    some: bool = True,
) -> dict[str, Patch]:
    """`find` among tensors by name. some: at least one name has to be there."""
    found, owner = {}, {}
    for name, change in changes.items():
        param = present.get(name)
        if param is None:
            if strict:
                raise DeltaError(f"{name}: expected a parameter of this name in the model, got none")
            continue
        check_param(name, param)
        _check_alike(name, tuple(param.shape), param.dtype, change, cast)
        if any(size > 1 and step == 0 for size, step in zip(param.shape, param.stride(), strict=True)):
            raise DeltaError(
                f"{name}: expected memory for each entry, got an expanded tensor; clone it first"
            )
        if id(param) in owner:
            raise DeltaError(f"{name}: expected a tensor of its own, got the one of {owner[id(param)]}")
        values = rounded(change.values, param.dtype)
        found[name], owner[id(param)] = Patch(param, change.indices, values), name
    if some and changes and not found:
        raise DeltaError(f"model: expected some of the delta's {len(changes)} parameters, got none of them")
    return found


def _check_alike(name: str, shape: tuple[int, ...], dtype: torch.dtype, change: Change, cast: bool) -> None:
    fits = shape == change.shape
    if fits and (cast or dtype == change.dtype):
        return
    expected, got = f"{change.dtype} {change.shape}", f"{dtype} {shape}"
    remedy = "; apply(cast=True) rounds the delta's values to the model's dtype" if fits else ""
    raise DeltaError(f"{name}: expected a parameter of {expected}, got {got}{remedy}")


def first_changed(patches: Mapping[str, Patch], changes: Mapping[str, Change]) -> Difference | None:
    """The first entry whose bits in the parameter differ from the patch's value; None if all agree.

    changes: those that `find` has made patches of. A difference has their indices.
    """
    held = read(list(patches.values()))
    for (name, patch), now in zip(patches.items(), held, strict=True):
        expected, found = patch.values.cpu(), now.values.cpu()
        at = first_difference(expected, found)
        if at is not None:
            index = at if patch.indices is None else int(changes[name].indices[at])
            return Difference(name, index, expected.reshape(-1)[at].item(), found.reshape(-1)[at].item())
    return None


class _Held(NamedTuple):
    """Entries of a patch: all of them, or those in one piece of its parameter, by their indices in that."""

    patch: int
    param: Tensor
    entries: slice
    indices: Tensor


def _sparse_groups(patches: Sequence[Patch]) -> Iterator[tuple[list[_Held], list[Tensor], Entries]]:
    sparse = [
        _Held(i, *own)
        for i, patch in enumerate(patches)
        if patch.indices is not None and not is_split(patch.param)
        for own in cut(patch.param, patch.indices)
    ]
    for kind in by_kind([held.param for held in sparse]):
        members = [sparse[i] for i in kind]
        params, rows = [held.param for held in members], [held.indices for held in members]
        offsets, indices = Entries.from_lists(rows, rows[0].device)
        yield members, params, Entries(offsets.to(params[0].device), indices.to(params[0].device))


def read(patches: Sequence[Patch]) -> list[Patch]:
    """The same entries with the values that the parameters hold now, on the parameters' devices.

    Where ranks hold parts of the parameters, every rank has to call this.
    """
    held = [Patch(p, None, full(p.detach()).clone()) if i is None else None for p, i, _ in patches]
    split = [i for i, patch in enumerate(patches) if patch.indices is not None and is_split(patch.param)]
    for i, values in zip(split, read_split([patches[i][:2] for i in split]), strict=True):
        held[i] = patches[i]._replace(values=values)
    for members, params, entries in _sparse_groups(patches):
        parts = id3_kernels.gather(params, entries).split([own.indices.numel() for own in members])
        for own, values in zip(members, parts, strict=True):
            before = held[own.patch]  # the entries of the pieces before this one
            joined = values if before is None else torch.cat([before.values, values])
            held[own.patch] = patches[own.patch]._replace(values=joined)
    return held


@torch.no_grad()
def write(patches: Sequence[Patch]) -> None:
    """Puts each patch's values into its parameter, in place."""
    for members, params, entries in _sparse_groups(patches):
        values = torch.cat([patches[own.patch].values[own.entries].to(params[0].device) for own in members])
        id3_kernels.scatter_(params, entries, values)
    for param, indices, values in patches:
        if indices is None:
            local(param).copy_(local(values) if is_split(values) else block_of(values, param))
        elif is_split(param):
            write_split(param, indices, values)

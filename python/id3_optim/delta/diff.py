"""The delta between two full models: the entries whose bits differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from id3_kernels.hashing import bits

from .. import pieces
from ..distributed.part import full, local
from ..wrappers import plain_name, plain_parameters
from . import coordinates
from .delta import Delta
from .file import VALUE_DTYPES, Change, DeltaError
from .fingerprint import fingerprint, same_bits
from .patches import check_param

_CHUNK = 1 << 22  # entries compared at once: at most 32 MiB of positions

Model = nn.Module | Mapping[str, Tensor]


def diff(base: Model, tuned: Model, originals: bool = True) -> Delta:
    """The delta that turns `base` into `tuned`: entries whose bits differ, NaN payloads and signs included.

    base, tuned: modules, whose parameters are compared and whose buffers are not, or mappings name → tensor,
    such as state dicts or the tensors of a checkpoint. Names are those of the plain model: a mapping's common
    prefix `module.` and parts `_orig_mod` are dropped. Tied weights count once, unchanged tensors are
    omitted, and a tensor of `tuned` alone is stored whole. A parameter of 2^31 entries or more counts as
    weights of its checkpoint: the experts of a layer, or ranges of rows.
    originals: keep the base's values, which `revert` and `merge` need; the delta has a fingerprint without
    them too.
    Works tensor by tensor, in the memory of the result and one tensor. Mutates nothing. For tensors
    that are split over ranks, which are made whole one by one, every rank has to call this.
    Raises DeltaError by name: for a tensor that `tuned` lacks, another shape or dtype, a tensor that a delta
    cannot hold, and weights tied in `base` that differ in `tuned`.
    """
    ours, theirs = _tensors(base), _tensors(tuned)
    for name in ours:
        if name not in theirs:
            raise DeltaError(f"{name}: expected a tensor of this name in tuned as in the base, got none")
    changes: dict[str, Change] = {}
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in theirs.items():
        change = _change(name, ours.get(name), tensor)
        place = _place(ours.get(name), tensor, name)
        first = seen.setdefault(place, name)
        if first != name:
            _check_tied(first, name, changes.get(first), change)
        elif change is not None:
            changes[name] = change
            if change.indices is not None:
                rows[name] = (change.indices, change.originals)
    mark = fingerprint(rows)
    if not originals:
        changes = {name: change._replace(originals=None) for name, change in changes.items()}
    return Delta(changes, mark, {"method": "diff"})


class _PartOf(NamedTuple):
    """A part of a large parameter. A DTensor is made whole when the turn of its part comes."""

    part: coordinates.Part
    param: Tensor


def _whole(tensor: Tensor | _PartOf) -> Tensor:
    return tensor.part.view(full(tensor.param)) if isinstance(tensor, _PartOf) else full(tensor)


def _tensors(model: Model) -> dict[str, Tensor | _PartOf]:
    """Detached tensors by their plain names, a tied one under each of its names."""
    if isinstance(model, nn.Module):
        params = {name: param.detach() for name, param in plain_parameters(model).items()}
        large = [name for name, param in params.items() if param.numel() > pieces.LARGEST]
        parts = coordinates.checkpoint_parts(model) if large else {}
        for name in large:
            coordinates.check_views(name, parts.get(name))
            param = params.pop(name)
            params |= {part.name: _PartOf(part, param) for part in parts.get(name, ())}
        return params
    wrapped = bool(model) and all(name.startswith("module.") for name in model)
    found: dict[str, Tensor] = {}
    for name, tensor in model.items():
        plain = plain_name(name.removeprefix("module.") if wrapped else name)
        if not isinstance(tensor, Tensor):
            raise DeltaError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if plain in found:
            raise DeltaError(f"{plain}: expected one tensor of this name in the mapping, got two")
        found[plain] = tensor.detach()
    return found


def _place(base: Tensor | _PartOf | None, tuned: Tensor | _PartOf, name: str) -> tuple:
    """Equal for names that share one tensor in the base, or in `tuned` where the base has none."""
    tensor = tuned if base is None else base
    if isinstance(tensor, _PartOf):  # of tied parameters one alone has parts
        return (name,)
    tensor = local(tensor)
    if tensor.is_meta or tensor.data_ptr() == 0:
        return (name,)
    return base is None, tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _check_tied(first: str, name: str, one: Change | None, other: Change | None) -> None:
    if one is None or other is None:
        agree = one is other
    else:
        agree = same_bits(one.values, other.values)
        agree &= one.indices is None or torch.equal(one.indices, other.indices)
    if not agree:
        raise DeltaError(f"{name}: expected the same change as in {first}, which is tied to it in the base, "
                         "got another one; clone one of the two in base")  # fmt: skip


def _change(name: str, base: Tensor | _PartOf | None, tuned: Tensor | _PartOf) -> Change | None:
    """The entries that differ, with originals; None if all agree."""
    tuned, base = _whole(tuned), None if base is None else _whole(base)
    shape, dtype = tuple(tuned.shape), tuned.dtype
    if base is not None and (tuple(base.shape), base.dtype) != (shape, dtype):
        expected = f"{base.dtype} {tuple(base.shape)}"
        raise DeltaError(f"{name}: expected {expected} in tuned as in the base, got {dtype} {shape}")
    if base is not None and dtype not in VALUE_DTYPES and torch.equal(base, tuned.to(base.device)):
        return None
    for tensor in (tuned, base):
        if tensor is not None:
            check_param(name, tensor)
    if tuned.numel() >= 2**31:
        raise DeltaError(f"{name}: expected fewer than 2^31 entries, got {tuned.numel()}; "
                         "diff of two modules splits it")  # fmt: skip
    if base is None:
        return Change(shape, dtype, None, tuned.cpu().clone(memory_format=torch.contiguous_format))
    found = []
    pairs = zip(base.reshape(-1).split(_CHUNK), tuned.reshape(-1).split(_CHUNK), strict=True)
    for i, (ours, theirs) in enumerate(pairs):
        ours, theirs = ours.cpu(), theirs.cpu()
        at = (bits(ours) != bits(theirs)).nonzero().squeeze(1)
        found.append(((at + i * _CHUNK).int(), theirs[at], ours[at]))
    indices, values, originals = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Change(shape, dtype, indices, values, originals) if indices.numel() else None

"""The sparse delta: what training changed, put on a model and taken off again in O(B)."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import id3_kernels
from id3_kernels import Entries

from . import delta_file
from .delta_file import Change, Contents, DeltaError
from .hashing import INCREMENT, SLICE, mix64

__all__ = ["Change", "Delta", "DeltaError", "Undo", "load_delta", "save_delta"]


class Patch(NamedTuple):
    """Values for a parameter: at flat indices (int32 [n]), or all of it when indices is None."""

    param: Tensor
    indices: Tensor | None
    values: Tensor


class Undo:
    """What `Delta.apply` replaced. Deltas stacked on each other are taken off in reverse order."""

    def __init__(self, previous: list[Patch]) -> None:
        self._previous = previous

    def revert(self) -> None:
        """Puts the replaced values back bit for bit, NaN payloads and signed zeros too. Works once."""
        _write(self._previous)
        self._previous = []


@dataclass(frozen=True)
class Delta:
    """A set of changed entries, by parameter name, with absolute values; made by `load_delta`.

    changes: parameter name → Change. fingerprint: identifies the base's values at these entries, None if they
    were not known. settings: the run's method, budget, step and numbers, as `ID3AdamW.settings()` gave them.
    """

    changes: dict[str, Change]
    fingerprint: int | None
    settings: dict[str, Any]

    def inspect(self) -> dict[str, Any]:
        """Counts, shapes and settings as plain values, ready for JSON. Reads no tensor."""
        kinds = {name: "dense" if c.indices is None else "sparse" for name, c in self.changes.items()}
        tensors = {
            name: {"kind": kinds[name], "shape": list(c.shape), "dtype": str(c.dtype).removeprefix("torch."),
                   "entries": c.values.numel()}
            for name, c in self.changes.items()
        }  # fmt: skip
        count = {
            k: sum(t["entries"] for t in tensors.values() if t["kind"] == k) for k in ("sparse", "dense")
        }
        parts = [
            t for c in self.changes.values() for t in (c.indices, c.values, c.originals) if t is not None
        ]
        return {
            "format_version": delta_file.VERSION,
            "entries": count["sparse"],
            "dense_entries": count["dense"],
            "tensor_bytes": sum(t.nbytes for t in parts),
            "originals": any(c.originals is not None for c in self.changes.values()),
            "fingerprint": None if self.fingerprint is None else f"{self.fingerprint:016x}",
            "settings": self.settings,
            "tensors": tensors,
        }

    def apply(self, model: nn.Module, strict: bool = True) -> Undo:
        """Writes the delta's values into the model's parameters, in place; returns what takes them off again.

        Works on any device, dtype and stride; costs O(entries). Parameters are found by their plain names
        (DDP and torch.compile wrappers are looked through). strict=False waives the base's fingerprint and
        names that the model lacks, nothing else; at least one name must match. A delta saved without
        originals has no fingerprint and needs strict=False.
        Raises DeltaError before any weight is touched: a name, shape or dtype that differs, a parameter that
        is not a plain dense tensor, or a base whose values are not those that training started from.
        """
        targets = self._targets(model, strict)
        patches = [Patch(p, self.changes[n].indices, self.changes[n].values) for n, p in targets.items()]
        previous = _read(patches)
        if strict:
            self._check_base(list(targets), previous)
        _write(patches)
        return Undo(previous)

    def revert(self, model: nn.Module) -> None:
        """Puts the originals stored in this delta (`save_delta(originals=True)`) back into a tuned model.

        Parameters stored whole have no originals: they stay as they are. Raises DeltaError, before any weight
        is touched, where the originals are missing or the model does not hold this delta's values.
        """
        sparse = {n: c for n, c in self.changes.items() if c.indices is not None}
        if any(c.originals is None for c in sparse.values()):
            raise DeltaError("originals: expected them in the delta (save_delta(originals=True)), got none")
        targets = self._targets(model, strict=True)
        held = _read([Patch(targets[n], c.indices, c.values) for n, c in sparse.items()])
        for (name, change), patch in zip(sparse.items(), held, strict=True):
            if not _same_bits(patch.values.cpu(), change.values):
                raise DeltaError(f"{name}: expected the values of this delta in the model, got others")
        _write([Patch(targets[n], c.indices, c.originals) for n, c in sparse.items()])

    @contextmanager
    def applied(self, model: nn.Module, strict: bool = True) -> Iterator[nn.Module]:
        """`with delta.applied(model):` has the delta on the model inside the block, and the base after it."""
        undo = self.apply(model, strict)
        try:
            yield model
        finally:
            undo.revert()

    def _targets(self, model: nn.Module, strict: bool) -> dict[str, nn.Parameter]:
        """The parameter for each name, all checked."""
        present, targets, owner = _named(model), {}, {}
        for name, change in self.changes.items():
            param = present.get(name)
            if param is None:
                if strict:
                    raise DeltaError(f"{name}: expected a parameter of this name in the model, got none")
                continue
            _check_param(name, param)
            if (tuple(param.shape), param.dtype) != (change.shape, change.dtype):
                expected, got = f"{change.dtype} {change.shape}", f"{param.dtype} {tuple(param.shape)}"
                raise DeltaError(f"{name}: expected a parameter of {expected}, got {got}")
            if id(param) in owner:
                raise DeltaError(f"{name}: expected a tensor of its own, got the one of {owner[id(param)]}")
            targets[name], owner[id(param)] = param, name
        if self.changes and not targets:
            raise DeltaError(
                f"model: expected some of the delta's {len(self.changes)} parameters, got none of them"
            )
        return targets

    def _check_base(self, names: list[str], previous: list[Patch]) -> None:
        if self.fingerprint is None:
            raise DeltaError("fingerprint: expected one in the delta, got none (saved without originals); "
                             "strict=False applies it unchecked")  # fmt: skip
        rows = {n: p[1:] for n, p in zip(names, previous, strict=True) if p.indices is not None}
        got = fingerprint(rows)
        if got != self.fingerprint:
            expected = f"the base with fingerprint {self.fingerprint:016x}"
            raise DeltaError(f"model: expected {expected}, got {got:016x} (another base, or already changed)")


def load_delta(path: str | os.PathLike) -> Delta:
    """Reads a delta file, checked whole (`delta_file.read`). Raises DeltaError or OSError."""
    delta = Delta(*delta_file.read(path))
    rows = {n: (c.indices, c.originals) for n, c in delta.changes.items() if c.indices is not None}
    if delta.fingerprint is not None and all(kept is not None for _, kept in rows.values()):
        got = fingerprint(rows)
        if got != delta.fingerprint:
            raise DeltaError(f"originals: expected the fingerprint {delta.fingerprint:016x}, got {got:016x}")
    return delta


def save_delta(path: str | os.PathLike, model: nn.Module, optimizer: Any, originals: bool = False) -> None:
    """Writes what `optimizer` (an ID3AdamW, or a wrapper that holds one) has trained in `model`.

    Stored are the absolute values of the entries that training may have changed, whole parameters for dense
    groups, with originals=True the values from before training too, and the fingerprint of the base. With
    keep_originals=False the originals are unknown: no fingerprint is stored. The write is atomic.
    Raises ValueError if the originals are asked for and unknown, or a parameter is not in the model or not a
    plain dense tensor; TypeError for another optimizer; OSError if writing fails (`delta_file.write`).
    """
    while not hasattr(optimizer, "touched"):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(f"optimizer: expected an ID3AdamW, got {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    names: dict[int, str] = {}
    for name, param in _named(model).items():
        names.setdefault(id(param), name)
    touched = [t for t in optimizer.touched() if t.indices.numel()]
    dense = [p for group in optimizer.param_groups if group.get("dense") for p in group["params"]]
    for param in [*(t.param for t in touched), *dense]:
        if id(param) not in names:
            raise ValueError(
                f"model: expected every trained parameter in it, got none for {tuple(param.shape)}"
            )
        _check_param(names[id(param)], param)
    known = all(t.originals is not None for t in touched)
    if originals and not known:
        raise ValueError("originals: expected an optimizer with keep_originals=True, got one that kept none")
    rows = {names[id(t.param)]: (t.indices, t.originals) for t in touched}
    mark = fingerprint(rows) if known else None
    changes = _collect(touched, dense, names, originals)
    delta_file.write(path, Contents(changes, mark, optimizer.settings()))


def _collect(
    touched: Sequence[Any], dense: Sequence[Tensor], names: dict, originals: bool
) -> dict[str, Change]:
    changes = {}
    for t, patch in zip(touched, _read([Patch(t.param, t.indices, t.param) for t in touched]), strict=True):
        kept = t.originals.cpu() if originals else None
        shape = tuple(t.param.shape)
        changes[names[id(t.param)]] = Change(shape, t.param.dtype, t.indices.cpu(), patch.values.cpu(), kept)
    for param in dense:
        changes[names[id(param)]] = Change(tuple(param.shape), param.dtype, None, param.detach().cpu())
    return changes


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names in the plain model, a tied one under each of its names."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    found: dict[str, nn.Parameter] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        plain = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if found.setdefault(plain, param) is not param:
            raise DeltaError(f"{plain}: expected one parameter of this name in the model, got two")
    return found


def _check_param(name: str, param: Tensor) -> None:
    kind = type(param).__name__ if type(param) not in (Tensor, nn.Parameter) else param.layout
    if kind is torch.strided and param.dtype not in delta_file.VALUE_DTYPES.values():
        kind = param.dtype
    if kind is not torch.strided:
        raise DeltaError(f"{name}: expected a plain dense tensor, got {kind}, which is not supported")
    if param.is_meta:
        raise DeltaError(f"{name}: expected a tensor with values, got one on the meta device")


def _kinds(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors that one kernel call can take together: same device and dtype."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        groups[tensor.device, tensor.dtype].append(i)
    return list(groups.values())


def _sparse_groups(patches: Sequence[Patch]) -> Iterator[tuple[list[int], list[Tensor], Entries]]:
    sparse = [i for i, patch in enumerate(patches) if patch.indices is not None]
    for kind in _kinds([patches[i].param for i in sparse]):
        members = [sparse[i] for i in kind]
        params, rows = [patches[i].param for i in members], [patches[i].indices for i in members]
        offsets, indices = Entries.from_lists(rows, rows[0].device)
        yield members, params, Entries(offsets.to(params[0].device), indices.to(params[0].device))


def _read(patches: Sequence[Patch]) -> list[Patch]:
    """The same places with the values that the parameters hold there now, on the parameters' devices."""
    held = [Patch(p, None, p.detach().clone()) if i is None else None for p, i, _ in patches]
    for members, params, entries in _sparse_groups(patches):
        parts = id3_kernels.gather(params, entries).split([patches[i].indices.numel() for i in members])
        for i, values in zip(members, parts, strict=True):
            held[i] = patches[i]._replace(values=values)
    return held


@torch.no_grad()
def _write(patches: Sequence[Patch]) -> None:
    for members, params, entries in _sparse_groups(patches):
        values = torch.cat([patches[i].values for i in members]).to(params[0].device)
        id3_kernels.scatter_(params, entries, values)
    for patch in patches:
        if patch.indices is None:
            patch.param.copy_(patch.values)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(_BITS[a.element_size()]), b.view(_BITS[b.element_size()]))


def fingerprint(rows: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """The sum modulo 2^64 over all entries of mix64(mix64(key + index·INCREMENT) xor bits), in any order.

    rows: parameter name → (flat indices, the values there). key: the first 8 bytes, little-endian, of the
    name's blake2b-64 (UTF-8); bits: a value's bit pattern, sign-extended. Widened 2^20 entries at a time.
    """
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in rows)
    keys = torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)
    indices, values = [i for i, _ in rows.values()], [v for _, v in rows.values()]
    total = 0
    for members in _kinds(values):
        owner = keys[members].repeat_interleave(torch.tensor([values[i].numel() for i in members]))
        index = torch.cat([indices[i] for i in members]).cpu()
        bits = torch.cat([values[i] for i in members]).cpu()
        bits = bits.view(_BITS[bits.element_size()])
        for part in zip(owner.split(SLICE), index.split(SLICE), bits.split(SLICE), strict=True):
            key, flat, pattern = (t.to(torch.int64) for t in part)
            total += mix64(mix64(key + flat * INCREMENT) ^ pattern).sum().item()
    return total % 2**64

"""The sparse delta: the entries that training changed, put on a model and taken off it in O(B)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.part import any_split, full
from ..distributed.writer import writes
from ..wrappers import check_holds, check_trained, plain_names, unwrapped
from . import file, hub
from .coordinates import checkpoint_parts, in_parts
from .facts import setting_of_model
from .file import Change, Contents, DeltaError
from .fingerprint import fingerprint, same_bits
from .patches import Patch, check_param, find, first_changed, read, write
from .values import check_finite, nonfinite, rounded


class Undo:
    """The values that `Delta.apply` wrote and replaced. Revert deltas that share entries in reverse order."""

    def __init__(self, model: nn.Module, written: dict[str, Change], previous: list[Patch]) -> None:
        self._model, self._written, self._previous = model, written, previous

    def revert(self, strict: bool = True) -> None:
        """Puts the replaced values back bit for bit, NaN payloads and signed zeros included, in O(entries).

        Raises DeltaError, and changes nothing, where the model no longer holds the values that this delta
        wrote: a later delta is on it, or the entries were trained further. strict=False puts the values back
        nevertheless, but still raises for a parameter that is missing or has another shape or dtype. The
        second call does nothing. Where deltas agree bit for bit on all entries that they share, a wrong order
        raises at the second of them.
        """
        if not self._previous:
            return
        placed = find(self._model, self._written, strict=True)
        changed = first_changed(placed, self._written) if strict else None
        if changed is not None:
            name, index, expected, held = changed
            raise DeltaError(f"{name}: expected {expected} at index {index}, as this delta wrote, got {held} "
                             "(by a later delta, or by training); revert later deltas first, "
                             "or pass strict=False")  # fmt: skip
        previous = zip(placed.values(), self._previous, strict=True)
        write([patch._replace(values=before.values) for patch, before in previous])
        self._previous = []

    def first_changed(self) -> str | None:
        """The first parameter that no longer holds the values that this delta wrote; None if all do."""
        changed = first_changed(find(self._model, self._written, strict=True), self._written)
        return None if changed is None else changed.name


@dataclass(frozen=True, eq=False)
class Delta:
    """A set of changed entries, by parameter name, with absolute values.

    Made by `load_delta`, `diff` or `merge`. changes: parameter name → Change. fingerprint: identifies the
    base's values at these entries, None if they were not known. settings: the delta's origin; for a trained
    delta the run's method, budget, step and options, as `ID3AdamW.settings()` gave them.
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
            "format_version": file.VERSION,
            "entries": count["sparse"],
            "dense_entries": count["dense"],
            "tensor_bytes": sum(t.nbytes for t in parts),
            "originals": any(c.originals is not None for c in self.changes.values()),
            "fingerprint": None if self.fingerprint is None else f"{self.fingerprint:016x}",
            "settings": self.settings,
            "tensors": tensors,
        }

    def nonfinite(self) -> dict[str, int]:
        """Parameter name → how many of its values are NaN or infinite, for parameters with any."""
        return nonfinite(self.changes)

    def save(self, path: str | os.PathLike, compact: bool = False, allow_nonfinite: bool = False) -> None:
        """Writes the delta file atomically. compact: indices as gaps, about 2 bytes less per entry.

        Raises DeltaError for values that are NaN or infinite without allow_nonfinite, OSError if writing
        fails (`atomic.write`).
        """
        if not allow_nonfinite:
            check_finite(self.changes)
        file.write(path, Contents(self.changes, self.fingerprint, self.settings), compact)

    def apply(
        self, model: nn.Module, strict: bool = True, cast: bool = False, allow_nonfinite: bool = False
    ) -> Undo:
        """Writes the delta's values into the model's parameters, in place; returns an Undo that reverts it.

        Works on any device, dtype and stride; costs O(entries). Parameters are found by their names in the
        plain model, without the wrappers of DDP and torch.compile. strict=False waives the base's fingerprint
        and names that the model lacks, nothing else; at least one name must match. strict=False is needed for
        a delta without a fingerprint (trained with keep_originals=False), and for a delta on top of another
        that changed some of its entries, unless its training started there.
        cast: applies `self.cast(model, strict)`, for a model in another dtype than the delta.
        allow_nonfinite: take values that are NaN or infinite.
        Raises DeltaError before any weight changes: for a name, shape or dtype that differs, a value that is
        not finite, a parameter that is not a plain dense tensor, or a base with other values than those that
        training started from.
        """
        if cast:
            return self.cast(model, strict).apply(model, strict, allow_nonfinite=allow_nonfinite)
        if not allow_nonfinite:
            check_finite(self.changes)
        placed = find(model, self.changes, strict)
        patches = list(placed.values())
        previous = read(patches)
        if strict:
            self.check_base(list(placed), previous)
        write(patches)
        return Undo(model, {name: self.changes[name] for name in placed}, previous)

    def cast(self, base: nn.Module, strict: bool = True) -> Delta:
        """This delta in the dtypes of `base`, with the originals and the fingerprint of `base`.

        Values are rounded to nearest even, once; to a wider dtype that is exact. The result applies, reverts,
        saves and merges like a delta that was trained on `base`. Mutates nothing. strict: as for `apply`. A
        base in another dtype has the fingerprint if its values, rounded to the delta's dtype, have it, or if
        they are the delta's originals, rounded to the dtype of the base. The latter needs stored originals.
        Raises DeltaError as `apply` does.
        """
        placed = find(base, self.changes, strict, cast=True)
        held = read(list(placed.values()))
        if strict:
            self.check_base(list(placed), held)
        changes = {}
        for (name, patch), now in zip(placed.items(), held, strict=True):
            kept, own = None if patch.indices is None else now.values.cpu(), self.changes[name]
            changes[name] = own._replace(dtype=patch.param.dtype, values=patch.values, originals=kept)
        rows = {n: (c.indices, c.originals) for n, c in changes.items() if c.indices is not None}
        return Delta(changes, fingerprint(rows), self.settings)

    def revert(self, model: nn.Module) -> None:
        """Puts the originals stored in this delta (`save_delta(originals=True)`) back into a tuned model.

        Parameters stored whole have no originals and keep their values. Raises DeltaError, before any weight
        changes, where the originals are missing or the model does not hold this delta's values.
        """
        sparse = {n: c for n, c in self.changes.items() if c.indices is not None}
        if any(c.originals is None for c in sparse.values()):
            raise DeltaError("originals: expected them in the delta, got none; save it with originals=True")
        found = find(model, self.changes, strict=True)
        placed = {name: found[name] for name in sparse}
        changed = first_changed(placed, self.changes)
        if changed is not None:
            name, index, expected, held = changed
            raise DeltaError(f"{name}: expected {expected} at index {index}, as in this delta, got {held}; "
                             "revert the model that this delta made")  # fmt: skip
        write([placed[n]._replace(values=c.originals) for n, c in sparse.items()])

    @contextmanager
    def applied(
        self, model: nn.Module, strict: bool = True, cast: bool = False, allow_nonfinite: bool = False
    ) -> Iterator[nn.Module]:
        """`with delta.applied(model):` puts the delta on the model for the block, and takes it off after it.

        After the block the delta's entries hold the base's bits, after an error too. Changes that the block
        made to them are discarded with a UserWarning: to train on top of a delta, use `apply`. Changes to
        further entries stay. strict, cast, allow_nonfinite: as for `apply`.
        """
        undo = self.apply(model, strict, cast, allow_nonfinite)
        try:
            yield model
        finally:
            name = undo.first_changed()
            undo.revert(strict=False)
            if name is not None:
                warnings.warn(f"{name}: changed while the delta was on; discarded the changes", stacklevel=3)

    def check_base(self, names: list[str], previous: list[Patch]) -> None:
        """Raises DeltaError unless `previous`, a base's values of parameters, have the fingerprint."""
        if self.fingerprint is None:
            raise DeltaError("fingerprint: expected one in the delta, got none (trained with "
                             "keep_originals=False); strict=False applies it unchecked")  # fmt: skip
        held = {n: p for n, p in zip(names, previous, strict=True) if p.indices is not None}
        own = {n: self.changes[n] for n in held}
        rows = {n: (c.indices, rounded(held[n].values, c.dtype)) for n, c in own.items()}
        got = fingerprint(rows)
        if got != self.fingerprint and not all(map(_is_rounded, own.values(), held.values())):
            expected = f"the base with fingerprint {self.fingerprint:016x}"
            raise DeltaError(f"model: expected {expected}, got {got:016x} (another base, or changed since); "
                             "load the base, or pass strict=False")  # fmt: skip


def _is_rounded(change: Change, held: Patch) -> bool:
    """The values held are the originals of the change, rounded to another dtype."""
    kept, values = change.originals, held.values.cpu()
    return kept is not None and kept.dtype != values.dtype and same_bits(rounded(kept, values.dtype), values)


def load_delta(path: str | os.PathLike, revision: str | None = None, **download: Any) -> Delta:
    """Reads and checks a whole delta file of either form (`file.read`), of this machine or of the hub.

    path: a file; or `user/repo`, the name of a repository on the Hugging Face hub with a `delta.safetensors`,
    where this machine has nothing of this name. revision, download: of a repository (`hub.local_file`).
    Raises DeltaError or OSError, and of a repository what huggingface_hub raises.
    """
    delta = Delta(*file.read(hub.local_file(path, revision, **download)))
    rows = {n: (c.indices, c.originals) for n, c in delta.changes.items() if c.indices is not None}
    if delta.fingerprint is not None and all(kept is not None for _, kept in rows.values()):
        got = fingerprint(rows)
        if got != delta.fingerprint:
            raise DeltaError(f"originals: expected the fingerprint {delta.fingerprint:016x}, got {got:016x}")
    return delta


def save_delta(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: Any,
    originals: bool = False,
    compact: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Writes the delta of `model` that `optimizer` (an ID3AdamW, or a wrapper that holds one) has trained.

    The file holds the absolute values of the entries that training may have changed, whole parameters of
    dense groups, the fingerprint of the base, and with originals=True the values before training. Under
    keep_originals=False the originals are unknown, and the file has no fingerprint. compact, allow_nonfinite:
    as in `Delta.save`. The write is atomic. Where ranks hold parts of the parameters, every rank has to call
    this, and the first writes.
    Raises ValueError for originals=True without known originals, or a parameter that is not in the model, not
    a plain dense tensor, or cast since it was trained; DeltaError for values that are NaN or infinite, as
    after a run that diverged; TypeError for another optimizer; OSError if writing fails (`atomic.write`).
    """
    optimizer, names = unwrapped(optimizer), plain_names(model)
    check_trained(names, optimizer)
    touched = [t for t in optimizer.touched() if t.indices.numel()]
    dense = [p for group in optimizer.param_groups if group.get("dense") for p in group["params"]]
    trained = [*(t.param for t in touched), *dense]
    check_holds(names, trained)
    for param in trained:
        check_param(names[id(param)], param)
    known = all(t.originals is not None for t in touched)
    if originals and not known:
        raise ValueError(
            "originals: expected an optimizer with keep_originals=True, got keep_originals=False"
        )
    changes = _collect(model, touched, dense, names, known)
    sparse = {name: change for name, change in changes.items() if change.indices is not None}
    rows = {name: (change.indices, change.originals) for name, change in sparse.items()}
    mark = fingerprint(rows) if known else None
    if not originals:
        changes |= {name: change._replace(originals=None) for name, change in sparse.items()}
    delta = Delta(changes, mark, optimizer.settings() | setting_of_model(model))
    if not allow_nonfinite:
        check_finite(changes)  # on every rank: one that fails alone leaves the other ranks waiting
    if not any_split(optimizer.param_groups) or writes(optimizer):
        delta.save(path, compact, allow_nonfinite=True)


def _collect(
    model: nn.Module, touched: Sequence[Any], dense: Sequence[Tensor], names: dict, known: bool
) -> dict[str, Change]:
    """Every change by name, with originals where they are known. Raises ValueError for cast parameters."""
    changes = {}
    for t in touched:
        if known and t.originals.dtype != t.param.dtype:
            raise ValueError(
                f"{names[id(t.param)]}: expected {t.originals.dtype}, as it was trained, got "
                f"{t.param.dtype}: save it before the model is cast; `Delta.cast` fits it to a cast base"
            )
    large = any(t.indices.dtype == torch.int64 for t in touched)
    parts = checkpoint_parts(model) if large else {}
    for t, patch in zip(touched, read([Patch(t.param, t.indices, t.param) for t in touched]), strict=True):
        name, kept = names[id(t.param)], t.originals.cpu() if known else None
        change = Change(tuple(t.param.shape), t.param.dtype, t.indices.cpu(), patch.values.cpu(), kept)
        whole = t.indices.dtype == torch.int32
        changes |= {name: change} if whole else in_parts(parts[name], name, change)
    for param in dense:
        changes[names[id(param)]] = Change(tuple(param.shape), param.dtype, None, full(param.detach()).cpu())
    return changes

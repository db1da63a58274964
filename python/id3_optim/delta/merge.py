"""One delta from several: the weighted sum of their differences to the originals, and their conflicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from id3_kernels.hashing import bits

from .delta import Delta
from .file import Change, DeltaError
from .fingerprint import fingerprint, first_difference
from .values import check_finite, rounded

Whole = Literal["agree", "first", "drop"]


class Conflict(NamedTuple):
    """Counts of one parameter's entries: all, those that several deltas change, the opposed ones."""

    entries: int
    overlapping: int
    opposed: int


class Merged(NamedTuple):
    """The result of `merge`. conflicts: parameter name → Conflict, for every parameter that is not whole."""

    delta: Delta
    conflicts: dict[str, Conflict]


def merge(
    deltas: Sequence[Delta],
    weights: Sequence[float] | None = None,
    whole: Whole = "agree",
    allow_nonfinite: bool = False,
) -> Merged:
    """The delta of value = original + Σ weight_i · (value_i − original), and a report of the conflicts.

    Computed in float64 and rounded once to the parameter's dtype; an entry of one delta alone, with weight 1,
    keeps its bits. So two equal deltas double their changes, unless weights say otherwise.
    weights: a finite number per delta, 1 by default. Overlapping entries are those that two deltas or more
    change: whose values differ from the originals in bits. Opposed entries have a positive difference in one
    delta and a negative one in another, before the weights. The result has originals and their fingerprint.
    allow_nonfinite: take values that are NaN or infinite, and sums that overflow. Mutates nothing.
    whole: the rule for parameters stored whole, such as new heads, which cannot be summed. "agree" takes them
    from the deltas that have them, which must agree bit for bit; "first" takes each unchanged from the first
    delta that has it; "drop" omits them all. The weights do not apply to them.
    Raises TypeError for a single delta, ValueError for weights or a rule out of range, DeltaError where
    originals are missing, where originals, shapes or dtypes differ between two deltas, and where a value that
    the result needs, or the result itself, is not finite.
    """
    if isinstance(deltas, Delta):
        raise TypeError("deltas: expected a list of deltas, got one Delta")
    if whole not in get_args(Whole):
        raise ValueError(f"whole: expected one of {', '.join(get_args(Whole))}, got {whole!r}")
    if not deltas:
        raise ValueError("deltas: expected at least one, got none")
    weights = [1.0] * len(deltas) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(deltas) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights: expected {len(deltas)} finite numbers, got {weights}")
    changes, conflicts = {}, {}
    for name in dict.fromkeys(name for delta in deltas for name in delta.changes):
        held = {i: delta.changes[name] for i, delta in enumerate(deltas) if name in delta.changes}
        _check_alike(name, held, whole)
        first = next(iter(held.values()))
        complete = first.indices is None
        if complete and whole == "drop":
            continue
        used = dict([next(iter(held.items()))]) if complete else held
        for i, change in used.items() if not allow_nonfinite else ():
            check_finite({name: change}, f"deltas[{i}]: ")
        if complete:
            changes[name] = first
        else:
            changes[name], conflicts[name] = _sum(name, held, weights)
    if not allow_nonfinite:
        check_finite(changes, "sum: ")
    rows = {name: (changes[name].indices, changes[name].originals) for name in conflicts}
    settings = {"method": "merge", "weights": weights, "whole": whole}
    settings["merged"] = [delta.settings for delta in deltas]
    return Merged(Delta(changes, fingerprint(rows), settings), conflicts)


def _check_alike(name: str, held: dict[int, Change], whole: Whole) -> None:
    """Raises DeltaError unless the changes of one parameter can be merged; does not compare originals.

    held: position of the delta → its change.
    """
    if whole != "agree" and all(change.indices is None for change in held.values()):
        return
    i, first = next(iter(held.items()))
    for j, change in held.items():
        for what in ("shape", "dtype"):
            one, other = getattr(first, what), getattr(change, what)
            if one != other:
                raise DeltaError(f"deltas[{j}]: {name}: expected {what} {one} as in deltas[{i}], got {other}")
        if (first.indices is None) != (change.indices is None):
            complete, entries = (i, j) if first.indices is None else (j, i)
            raise DeltaError(
                f"deltas[{entries}]: {name}: expected it stored whole as in deltas[{complete}], got entries"
            )
        at = first_difference(first.values, change.values) if change.indices is None else None
        if at is not None:
            one, other = first.values.reshape(-1)[at].item(), change.values.reshape(-1)[at].item()
            raise DeltaError(
                f"deltas[{j}]: {name}: expected {one} at index {at} as in deltas[{i}], got {other}; "
                "a tensor that is stored whole merges with whole='first' or 'drop'"
            )
        if change.indices is not None and change.originals is None:
            raise DeltaError(
                f"deltas[{j}]: {name}: expected originals, got none; save the delta with originals=True"
            )


def _sum(name: str, held: dict[int, Change], weights: list[float]) -> tuple[Change, Conflict]:
    first = next(iter(held.values()))
    indices, owners = torch.cat([c.indices for c in held.values()]).unique(return_inverse=True)
    n = indices.numel()
    places = dict(zip(held, owners.split([c.indices.numel() for c in held.values()]), strict=True))
    originals = _originals(name, held, indices, places)
    moved = torch.zeros(n, dtype=torch.float64)
    deltas_with, deltas_changing = (torch.zeros(n, dtype=torch.int32) for _ in range(2))
    values, exact = originals.clone(), torch.zeros(n, dtype=torch.bool)
    up, down = (torch.zeros(n, dtype=torch.bool) for _ in range(2))
    for i, change in held.items():
        at, difference = places[i], change.values.double() - change.originals.double()
        moved[at] += weights[i] * difference
        up[at] |= difference > 0
        down[at] |= difference < 0
        deltas_with[at] += 1
        deltas_changing[at] += (bits(change.values) != bits(change.originals)).int()
        values[at] = change.values
        exact[at] = weights[i] == 1
    exact &= deltas_with == 1
    summed = rounded(originals.double() + moved, first.dtype)
    # An entry that did not move keeps the original's bits: -0.0 + 0.0 would be 0.0.
    values = torch.where(exact, values, torch.where(moved == 0, originals, summed))
    conflict = Conflict(n, int((deltas_changing > 1).sum()), int((up & down).sum()))
    return Change(first.shape, first.dtype, indices, values, originals), conflict


def _originals(name: str, held: dict[int, Change], indices: Tensor, places: dict[int, Tensor]) -> Tensor:
    """The originals of the union's entries. Raises DeltaError where two deltas disagree on one.

    indices: of the union's entries, int32 [n]. places: position of a delta → where its entries are in them.
    """
    n = indices.numel()
    originals = torch.zeros(n, dtype=next(iter(held.values())).dtype)
    owner = torch.full((n,), -1)
    for i, change in held.items():
        at = places[i]
        differs = (owner[at] >= 0) & (bits(originals)[at] != bits(change.originals))
        if differs.any():
            k = int(differs.nonzero()[0])
            j, index = int(owner[at[k]]), int(indices[at[k]])
            expected, got = originals[at[k]].item(), change.originals[k].item()
            raise DeltaError(f"deltas[{i}]: {name}: expected the original {expected} at index {index} as in "
                             f"deltas[{j}], got {got}; merge deltas of one base")  # fmt: skip
        originals[at] = change.originals
        owner[at] = i
    return originals

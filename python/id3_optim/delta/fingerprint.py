"""Bit patterns: the fingerprint of a delta's base, and equality that distinguishes signed zeros and NaNs."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from id3_kernels import reference, table
from id3_kernels.hashing import bits


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes and bit patterns; both on one device, of one dtype."""
    return torch.equal(bits(a), bits(b))


def first_difference(a: Tensor, b: Tensor) -> int | None:
    """The flat position of the first entry whose bits differ, None if all agree; as for `same_bits`."""
    if same_bits(a, b):
        return None
    return int((bits(a.reshape(-1)) != bits(b.reshape(-1))).nonzero()[0])


def by_kind(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors that one kernel call can process together: same device and dtype."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        groups[tensor.device, tensor.dtype].append(i)
    return list(groups.values())


def fingerprint(rows: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """The sum modulo 2^64 over all entries of mix64(mix64(key + index·INCREMENT) xor bits), in any order.

    rows: parameter name → (flat indices, the values there). key: the first 8 bytes, little-endian, of the
    name's blake2b-64 (UTF-8); bits: a value's bit pattern, sign-extended.
    """
    return fingerprints(rows)[0] if rows else 0


def fingerprints(rows: Mapping[str, tuple[Tensor, ...]]) -> list[int]:
    """`fingerprint` of several values at the same entries: rows has (flat indices, values, values, …)."""
    keys = torch.tensor([_key(name) for name in rows], dtype=torch.int64)
    columns = list(zip(*rows.values(), strict=True))
    totals = [0] * (len(columns) - 1)
    for members in by_kind(columns[1]):
        counts = torch.tensor([0] + [columns[1][i].numel() for i in members])
        index, *values = (torch.cat([column[i] for i in members]).cpu() for column in columns)
        kernels = reference if index.dtype == torch.int64 else table.kernels_for(index.device, None)
        sums = kernels.fingerprint(values, keys[members], counts.cumsum(0), index)
        totals = [total + added for total, added in zip(totals, sums.tolist(), strict=True)]
    return [total % 2**64 for total in totals]


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)

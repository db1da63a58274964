"""Ascending indices as gaps in LEB128: one to five bytes for an entry, two at densities around 0.1 %.

The first gap is the first index. Every further gap is the distance from the previous index, less one, so that
every sequence of gaps decodes to ascending, unique indices. A gap is written in groups of seven bits, the
lowest first, in as few bytes as possible; all bytes of a gap except its last have the top bit set.
"""

import numpy as np
import torch
from torch import Tensor

LONGEST_BYTES = 5
_BLOCK_BYTES = 1 << 20  # decoded at once: bounds the arrays that are widened to 64 bits


def encode(indices: Tensor) -> Tensor:
    """uint8 [bytes] from ascending, unique indices, int32 [n] on the CPU."""
    gaps = np.diff(indices.numpy().astype(np.int64), prepend=-1) - 1
    lengths = 1 + sum((gaps >= 1 << 7 * k).astype(np.int64) for k in range(1, LONGEST_BYTES))
    starts = np.cumsum(lengths) - lengths
    coded = np.empty(int(lengths.sum()), dtype=np.uint8)
    for k in range(LONGEST_BYTES):
        longer = lengths > k
        more = (lengths[longer] > k + 1).astype(np.int64) << 7
        coded[starts[longer] + k] = gaps[longer] >> 7 * k & 0x7F | more
    return torch.from_numpy(coded)


def decode(coded: Tensor, count: int) -> Tensor:
    """int32 [count], ascending and unique, from uint8 [bytes] on the CPU.

    Raises ValueError for bytes that `encode` does not write for `count` indices.
    """
    stored, indices = coded.numpy(), np.empty(count, dtype=np.int32)
    at, done, last = 0, 0, -1
    while at < len(stored):
        block = stored[at : at + _BLOCK_BYTES]
        ends = np.flatnonzero(block < 0x80)
        if not len(ends):
            raise ValueError("gaps: expected gaps that end, got a gap without a last byte")
        if done + len(ends) > count:
            raise ValueError(f"gaps: expected {count} gaps, got at least {done + len(ends)}")
        found = last + np.cumsum(_gaps(block, ends) + 1)
        if found[-1] >= 1 << 31:
            raise ValueError(f"gaps: expected indices below 2^31, got {found[-1]}")
        indices[done : done + len(ends)] = found
        at, done, last = at + int(ends[-1]) + 1, done + len(ends), int(found[-1])
    if done != count:
        raise ValueError(f"gaps: expected {count} gaps, got {done}")
    return torch.from_numpy(indices)


def _gaps(block: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [n]: the gaps whose last bytes are at `ends`; at most 2^35 each."""
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > LONGEST_BYTES:
        raise ValueError(f"gaps: expected gaps of at most {LONGEST_BYTES} bytes, got {lengths.max()}")
    if ((lengths > 1) & (block[ends] == 0)).any():
        raise ValueError("gaps: expected gaps in as few bytes as they need, got a zero as last byte")
    gaps = np.zeros(len(ends), dtype=np.int64)
    for k in range(int(lengths.max())):
        longer = lengths > k
        gaps[longer] |= (block[(ends - lengths + 1)[longer] + k].astype(np.int64) & 0x7F) << 7 * k
    return gaps

"""The fingerprint of values at entries: `docs/delta-format.md` has the formula."""

import torch

from ..hashing import INCREMENT, bits, mix64

_SLICE = 1 << 16  # entries hashed at once: the temporaries stay in a core's cache


def fingerprint(values, keys, offsets, indices):
    owners = keys.repeat_interleave(offsets.diff())
    totals = torch.zeros(len(values), dtype=torch.int64, device=indices.device)
    for begin in range(0, owners.numel(), _SLICE):
        part = slice(begin, min(begin + _SLICE, owners.numel()))
        places = mix64(owners[part] + indices[part].long() * INCREMENT)
        for i, column in enumerate(values):
            totals[i] += mix64(places ^ bits(column[part]).long()).sum()
    return totals

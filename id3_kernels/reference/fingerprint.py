"""The fingerprint of values at entries: `docs/delta-format.md` has the formula."""

import torch

from ..hashing import INCREMENT, mix64

_SLICE = 1 << 16  # entries hashed at once: the temporaries stay in a core's cache
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(values, keys, offsets, indices):
    owners = keys.repeat_interleave(offsets.diff())
    totals = torch.zeros(len(values), dtype=torch.int64, device=indices.device)
    for begin in range(0, owners.numel(), _SLICE):
        part = slice(begin, min(begin + _SLICE, owners.numel()))
        places = mix64(owners[part] + indices[part].long() * INCREMENT)
        for i, pattern in enumerate(values):
            bits = pattern[part].view(_BITS[pattern.element_size()]).long()
            totals[i] += mix64(places ^ bits).sum()
    return totals

"""What the optimizer allocates, by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .release import Release
from .state import Layout, Shard


def memory_report(
    shards: list[Shard], layout: Layout, dense_states: Iterable[dict], release: Release | None
) -> dict[str, int]:
    """Bytes by kind, `total` last; see `ID3AdamW.memory_report`."""
    kinds = Shard(torch.device("cpu"), torch.float32, layout).bytes_by_kind()
    report = dict.fromkeys(kinds, 0)
    for shard in shards:
        for kind, size in shard.bytes_by_kind().items():
            report[kind] += size
    report["dense_state"] = sum(t.nbytes for state in dense_states for t in state.values())
    at_once = max if release else sum  # hooks select from one tensor at a time
    report["candidates"] = sum(best.nbytes for best in release.best) if release else 0
    report["select_tiles"] = at_once([_tile_bytes(s, at_once) for s in shards] or [0])
    report["select_mask"] = at_once(
        [at_once([p.numel() for p in s.params]) // 8 for s in shards if _keeps_a_mask(s)] or [0]
    )
    report["total"] = sum(report.values())
    return report


def _tile_bytes(shard: Shard, at_once: Callable) -> int:
    if shard.layout.release and not _keeps_a_mask(shard):
        return 0  # the C++ kernel keeps the maxima of a few tiles alone
    key_bytes = 8 if shard.dtype == torch.float64 else 4
    return at_once([-(-p.numel() // 256) * key_bytes for p in shard.params])


def _keeps_a_mask(shard: Shard) -> bool:
    return shard.layout.backend == "triton" or (shard.layout.backend is None and shard.device.type != "cpu")

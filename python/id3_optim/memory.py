"""What the optimizer allocates, by kind."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .state import Layout, Shard


def memory_report(shards: list[Shard], layout: Layout, dense_states: Iterable[dict]) -> dict[str, int]:
    """Bytes by kind, `total` last; see `ID3AdamW.memory_report`."""
    kinds = Shard(torch.device("cpu"), torch.float32, layout).bytes_by_kind()
    report = dict.fromkeys(kinds, 0)
    for shard in shards:
        for kind, size in shard.bytes_by_kind().items():
            report[kind] += size
    report["dense_state"] = sum(t.nbytes for state in dense_states for t in state.values())
    report["select_tiles"] = sum(_tile_bytes(shard) for shard in shards)
    report["select_mask"] = sum(shard.numel // 8 for shard in shards if _keeps_a_mask(shard))
    report["total"] = sum(report.values())
    return report


def _tile_bytes(shard: Shard) -> int:
    key_bytes = 8 if shard.dtype == torch.float64 else 4
    return sum(-(-p.numel() // 256) * key_bytes for p in shard.params)


def _keeps_a_mask(shard: Shard) -> bool:
    return shard.layout.backend == "triton" or (shard.layout.backend is None and shard.device.type != "cpu")

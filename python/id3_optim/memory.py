"""What the optimizer allocates, by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from id3_kernels import table
from id3_kernels.entries import TILE

from .release import Release
from .state import Layout, Shard


def memory_report(
    shards: list[Shard], layout: Layout, dense_states: Iterable[dict], release: Release | None
) -> dict[str, int]:
    """Bytes by kind, `total` last; see `ID3AdamW.memory_report`."""
    anywhere = replace(layout, backend=None)  # a backend for GPUs has no shard on the CPU
    report = dict.fromkeys(_bytes_by_kind(Shard(torch.device("cpu"), torch.float32, anywhere)), 0)
    for shard in shards:
        for kind, size in _bytes_by_kind(shard).items():
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


def _bytes_by_kind(shard: Shard) -> dict[str, int]:
    size = {name: array.nbytes for name, array in shard.arrays.items()}
    ever, ever_originals = shard.ever, shard.ever_originals
    return {
        "indices": size["indices"],
        "moments": size["exp_avg"] + size["exp_avg_sq"],
        "masters": size.get("master", 0),
        "originals": size.get("originals", 0) + (0 if ever_originals is None else ever_originals.nbytes),
        "ages": size.get("age", 0),
        "accumulator": size.get("gradient", 0),
        "ever_active": 0 if ever is None else ever.indices.nbytes,
        "tensor_tables": 8 * (shard.offsets.numel() + shard.steps.numel()),
    }


def _tile_bytes(shard: Shard, at_once: Callable) -> int:
    if shard.layout.release and not _keeps_a_mask(shard):
        return 0  # the C++ kernel keeps the maxima of a few tiles alone
    key_bytes = 8 if shard.dtype == torch.float64 else 4
    return at_once([-(-p.numel() // TILE) * key_bytes for p in shard.params])


def _keeps_a_mask(shard: Shard) -> bool:
    on_gpu = shard.layout.backend is None and shard.device.type != "cpu"
    return shard.layout.backend == "triton" or (on_gpu and table.for_gpu().__name__.endswith("triton"))

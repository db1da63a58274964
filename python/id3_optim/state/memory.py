"""What the optimizer allocates, in bytes by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from id3_kernels.entries import TILE
from id3_kernels.table import for_gpu

from ..distributed.part import local
from .active_set import ActiveSet
from .repeat import EverActive
from .shard import Shard


def memory_report(
    active: ActiveSet,
    dense_states: Iterable[dict],
    candidates: Iterable[Tensor] = (),
    features: Iterable[Tensor] = (),
) -> dict[str, int]:
    """Bytes by kind, `total` last; see `ID3AdamW.memory_report`. candidates: what hooks keep until a step.
    features: what layers with a sparse backward pass know of their active entries."""
    anywhere = replace(active.layout, backend=None)  # a backend for GPUs has no shard on the CPU
    report = dict.fromkeys(_bytes_by_kind(Shard(torch.device("cpu"), torch.float32, anywhere), None), 0)
    for i, shard in enumerate(active.shards):
        for kind, size in _bytes_by_kind(shard, active.ever[i] if active.ever else None).items():
            report[kind] += size
    dense = (state.values() for state in dense_states if isinstance(state, dict))
    report["dense_state"] = sum(local(t).nbytes for values in dense for t in values if isinstance(t, Tensor))
    report["candidates"] = sum(t.nbytes for t in candidates)
    report["kept_features"] = sum(t.nbytes for t in features)
    at_once = max if active.layout.release else sum  # hooks select from one tensor at a time
    report["select_tiles"] = at_once([_tile_bytes(s, at_once) for s in active.shards] or [0])
    masks = [at_once([p.numel() for p in s.params]) // 8 for s in active.shards if _keeps_a_mask(s)]
    report["select_mask"] = at_once(masks or [0])
    report["total"] = sum(report.values())
    return report


def _bytes_by_kind(shard: Shard, ever: EverActive | None) -> dict[str, int]:
    size = {name: array.nbytes for name, array in shard.arrays.items()}
    ever_originals = 0 if ever is None or ever.originals is None else ever.originals.nbytes
    return {
        "indices": size["indices"],
        "moments": size["exp_avg"] + size["exp_avg_sq"],
        "masters": size.get("master", 0),
        "originals": size.get("originals", 0) + ever_originals,
        "ages": size.get("age", 0),
        "accumulator": size.get("gradient", 0),
        "ever_active": 0 if ever is None else ever.entries.indices.nbytes,
        "tensor_tables": sum(table.nbytes for table in shard.tables()),
    }


def _tile_bytes(shard: Shard, at_once: Callable) -> int:
    if shard.layout.release and not _keeps_a_mask(shard):
        return 0  # the C++ kernel keeps the maxima of a few tiles alone
    key_bytes = 8 if shard.dtype == torch.float64 else 4
    return at_once([-(-p.numel() // TILE) * key_bytes for p in shard.params])


def _keeps_a_mask(shard: Shard) -> bool:
    on_gpu = shard.layout.backend is None and shard.device.type != "cpu"
    return shard.layout.backend == "triton" or (on_gpu and for_gpu().__name__.endswith("triton"))

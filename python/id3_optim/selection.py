"""Which entries join: the exact best k over all shards, by any heuristic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from id3_kernels import Entries

from .heuristics import D3, Heuristic, scores
from .state import Shard


class Selection(NamedTuple):
    """What the newest selection did: at which step which scores [count] joined."""

    step: int
    scores: Tensor

    @property
    def count(self) -> int:
        return self.scores.numel()

    @property
    def threshold(self) -> float | None:
        """The smallest score, None if nothing joined. Waits for a GPU, which is why no step asks."""
        return self.scores.min().item() if self.count else None


class Candidates(NamedTuple):
    """Entries with their scores, on the CPU: global tensor position, flat index, score; [n] each."""

    position: Tensor
    index: Tensor
    score: Tensor


def select(
    shards: list[Shard],
    grads: list[list[Tensor | None]],
    heuristic: Heuristic,
    k: int,
    names: list[str] | None,
    fresh: bool,
) -> tuple[list[Entries], Tensor]:
    """The best k entries outside the active sets (`fresh`: of all), as one Entries per shard.

    Also gives their scores [count], in entry order. Ties go to the lowest (position, index).
    """
    if isinstance(heuristic, D3) and len(shards) == 1:
        picked, score = _by_d3(shards[0], grads[0], heuristic, k, fresh)
        return [picked], score
    found = []
    for shard, g in zip(shards, grads, strict=True):
        if isinstance(heuristic, D3):
            found.append(_candidates(shard, *_by_d3(shard, g, heuristic, k, fresh)))
        else:
            found.append(_by_scores(shard, g, heuristic, k, names, fresh))
    best = _best(found, k)
    return [_entries(shard, best) for shard in shards], best.score


def _active(shard: Shard, fresh: bool) -> Entries:
    return Entries.empty(len(shard.params), shard.device) if fresh else shard.active


def _by_d3(shard: Shard, grads: list, heuristic: D3, k: int, fresh: bool) -> tuple[Entries, Tensor]:
    k = min(k, shard.numel)
    offsets, indices, score = shard.kernels.select_topk(
        shard.params, grads, *_active(shard, fresh), k, heuristic.eps, heuristic.exp
    )
    n = int(offsets[-1])
    return Entries(offsets, indices[:n]), score[:n]


def _by_scores(shard: Shard, grads: list, heuristic: Heuristic, k: int, names, fresh: bool) -> Candidates:
    """Tensor by tensor, so that no more than one tensor's scores and O(k) candidates are alive."""
    taken = _active(shard, fresh).lists()
    best = _best([], k)
    for j, (param, position) in enumerate(zip(shard.params, shard.positions, strict=True)):
        score = scores(heuristic, param, grads[j], position, names[position] if names else None)
        if score is None:
            continue
        offsets = torch.tensor([0, taken[j].numel()], device=shard.device)
        n_best = min(k, param.numel())
        offsets, index, value = shard.kernels.select_topk_by_score([score], offsets, taken[j], n_best)
        n = int(offsets[-1])
        here = torch.full((n,), position, dtype=torch.int64, device="cpu")
        best = _best([best, Candidates(here, index[:n].cpu().long(), value[:n].cpu().double())], k)
    return best


def _candidates(shard: Shard, picked: Entries, score: Tensor) -> Candidates:
    position = torch.tensor(shard.positions, device="cpu").repeat_interleave(picked.offsets.diff().cpu())
    return Candidates(position, picked.indices.cpu().long(), score.cpu().double())


def _best(found: list[Candidates], k: int) -> Candidates:
    """The k best by score, ties to the lowest (position, index); in (position, index) order."""
    if not found:
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        return Candidates(empty, empty, empty.double())
    merged = [torch.cat(column) for column in zip(*found, strict=True)]
    in_order = ((merged[0] << 32) | merged[1]).argsort()
    position, index, score = (column[in_order] for column in merged)
    kept = score.sort(descending=True, stable=True).indices[:k].sort().values
    return Candidates(position[kept], index[kept], score[kept])


def _entries(shard: Shard, best: Candidates) -> Entries:
    """The candidates that live in this shard."""
    positions = torch.tensor(shard.positions, device="cpu")
    where = torch.searchsorted(positions, best.position).clamp(max=len(positions) - 1)
    mine = positions[where] == best.position
    counts = torch.bincount(where[mine], minlength=len(positions))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Entries(offsets.to(shard.device), best.index[mine].to(shard.device, torch.int32))

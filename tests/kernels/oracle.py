"""What the kernels must give, by brute force in numpy: one array of all scores and a stable sort."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from id3_kernels import Entries


def array(tensor: Tensor) -> np.ndarray:
    """The entries in logical order, widened to the dtype of the arithmetic."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().cpu().to(wide).contiguous().reshape(-1).numpy()


def d3_score(param: Tensor, grad: Tensor, eps: float, exp: float) -> np.ndarray:
    """The formulas of the specification; IEEE float32 (float64 for float64), each operation rounded once."""
    g = np.abs(array(grad))
    with np.errstate(all="ignore"):
        d = np.abs(array(param)) + g.dtype.type(eps)
        if exp == 0:
            score = g
        elif exp in (0.5, 1.0, 2.0):
            score = g / {0.5: np.sqrt(d), 1.0: d, 2.0: d * d}[exp]
        elif exp in (-0.5, -1.0, -2.0):
            score = g * {-0.5: np.sqrt(d), -1.0: d, -2.0: d * d}[exp]
        else:
            score = (g.astype(np.float64) / np.power(d.astype(np.float64), exp)).astype(g.dtype)
    tiny = np.finfo(g.dtype).tiny
    return np.where((g < tiny) | (score < tiny), g.dtype.type(0), score)


def topk(scores: Sequence[np.ndarray | None], active: Entries | None, k: int):
    """(offsets, indices, scores) of the k best: sort all by (score descending, position ascending)."""
    sizes = [0 if s is None else s.size for s in scores]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    given = [s for s in scores if s is not None]
    flat = np.concatenate(given) if given else np.zeros(0, np.float32)
    free = np.ones(flat.size, bool)
    for j, taken in enumerate(active.lists() if active else []):
        if scores[j] is not None:
            free[starts[j] + taken.cpu().numpy().astype(np.int64)] = False
    with np.errstate(invalid="ignore"):
        allowed = np.flatnonzero(free & np.isfinite(flat) & (flat >= np.finfo(flat.dtype).tiny))
    best = np.sort(allowed[np.argsort(-flat[allowed], kind="stable")][:k])
    owner = np.searchsorted(starts, best, side="right") - 1
    offsets = np.searchsorted(owner, np.arange(len(scores) + 1))
    return offsets, best - starts[owner], flat[best]


def check_selection(result: tuple[Entries, Tensor], expected) -> None:
    """Equality of set, order and the bits of the scores; nothing here has a tolerance."""
    (offsets, indices), scores = result
    assert offsets.dtype == torch.int64
    assert indices.dtype == torch.int32
    np.testing.assert_array_equal(offsets.cpu().numpy(), expected[0])
    np.testing.assert_array_equal(indices.cpu().numpy(), expected[1])
    assert scores.cpu().numpy().dtype == expected[2].dtype
    np.testing.assert_array_equal(scores.cpu().numpy(), expected[2])


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns as integers; every NaN has the same one."""
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor).view(integer)


def check_bits(got: Tensor, expected: Tensor, name: str = "") -> None:
    assert got.dtype == expected.dtype, name
    assert got.shape == expected.shape, name
    differing = (bits(got) != bits(expected)).reshape(-1).nonzero().flatten().tolist()
    if differing:
        i = differing[0]
        values = got.detach().cpu().reshape(-1)[i].item(), expected.detach().cpu().reshape(-1)[i].item()
        raise AssertionError(
            f"{name}: {len(differing)} differ, the first at {i}: {values[0]!r}, not {values[1]!r}"
        )


def storage(tensor: Tensor) -> Tensor:
    """Everything that stands in the memory behind a view, also what the view skips."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def dense_adamw(w, m, v, g, mask, step, lr, beta1, beta2, eps, weight_decay):
    """One AdamW step in float64 (Loshchilov and Hutter, algorithm 2) where `mask` is true; in place."""
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    unbiased = new_m / (1 - beta1**step), new_v / (1 - beta2**step)
    new_w = w - lr * weight_decay * w - lr * unbiased[0] / (np.sqrt(unbiased[1]) + eps)
    for array_, new in ((w, new_w), (m, new_m), (v, new_v)):
        array_[mask] = new[mask]

"""The score of equation 1, and the order of scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def d3_score(param: Tensor, grad: Tensor, eps: float, exp: float) -> Tensor:
    wide = wide_dtype(param.dtype)
    g = grad.to(wide).abs()
    score = g if exp == 0 else _divide(g, param.to(wide).abs() + eps, exp)
    tiny = torch.finfo(wide).tiny
    return torch.where((g < tiny) | (score < tiny), torch.zeros_like(score), score).contiguous()


def _divide(g: Tensor, d: Tensor, exp: float) -> Tensor:
    """|g| / d^exp with every operation rounded once."""
    special = {
        0.5: lambda: g / exact_sqrt(d),
        1.0: lambda: g / d,
        2.0: lambda: g / (d * d),
        -0.5: lambda: g * exact_sqrt(d),
        -1.0: lambda: g * d,
        -2.0: lambda: g * (d * d),
    }
    if exp in special:
        return special[exp]()
    return (g.double() / d.double().pow(exp)).to(g.dtype)


def exact_sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded. On the CPU torch may use a vector library, which is one ulp off in
    one root of five."""
    if x.device.type != "cpu":
        return x.sqrt()
    return torch.from_numpy(np.sqrt(x.detach().reshape(-1).numpy())).reshape(x.shape)


def order_key(score: Tensor) -> Tensor:
    """The bits of the score as an integer, in the order of scores; 0 where the entry cannot be selected."""
    integer, lowest, infinite = (
        (torch.int64, 1 << 52, 0x7FF << 52)
        if score.dtype == torch.float64
        else (torch.int32, 1 << 23, 0xFF << 23)
    )
    bits = score.contiguous().view(integer)
    return torch.where((bits >= lowest) & (bits < infinite), bits, torch.zeros_like(bits))

"""A heuristic whose scores are comparable over tensors of unlike scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from id3_kernels import d3_score

from . import heuristics
from .heuristics import D3


@dataclass(frozen=True)
class Relative:
    """D3 over its mean in the tensor: the entries that stand out in their own tensor join first.

    Scores of different tensors are compared, so that D3 prefers tensors of large gradients or small weights,
    such as biases. The mean, in float64, takes the scale of a tensor's gradients out, and with `eps` small
    beside the weights theirs too. Within a tensor the order is D3's. Does not apply to DTensors, of which a
    rank sees a part alone (ValueError).
    """

    d3: D3 = D3()  # noqa: RUF009 - frozen

    def __call__(self, param: Tensor, grad: Tensor) -> Tensor:
        """Scores of param's shape, float32 (float64 for float64)."""
        score = d3_score(param, grad, eps=self.d3.eps, exp=self.d3.exp)
        return score.div_(score.mean(dtype=torch.float64))

    def describe(self) -> dict[str, Any]:
        """Plain values, which a resumed run must share."""
        return {"d3": heuristics.describe(self.d3)}

"""A heuristic from the gradients of several steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from id3_kernels import d3_score

from . import heuristics
from .heuristics import D3

KINDS = ("sum", "mean", "adam")
KEY = "running"  # in the first param group of a saved state


class Running:
    """D3 with a number from all steps in place of |g|.

    kind: "sum", of the gradients since the last selection (with `select_every=K`, K batches in one);
        "mean", |m|, a running mean with the rate beta1; "adam", |m| / √v with the rates beta1 and beta2, both
        corrected for their start at 0, as AdamW would move the entry.
    d3: the denominator.

    ID3AdamW gives it the gradients of every step. It keeps one float32 (for "adam" two) for each entry of
    the parameters. The optimizer's state dict holds these too, so that a resumed run goes on bit for bit.
    Does not apply to released gradients or a GradScaler, whose steps it would read scaled. Raises ValueError
    for another kind.
    """

    def __init__(self, kind: str, d3: D3 = D3(), betas: tuple[float, float] = (0.9, 0.999)):  # noqa: B008
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.d3, self.betas = kind, d3, betas
        self._kept: dict[Tensor, tuple[Tensor, Tensor, int]] = {}  # first and second moment, steps

    def describe(self) -> dict[str, Any]:
        """Plain values, which a resumed run must share."""
        return {"kind": self.kind, "d3": heuristics.describe(self.d3), "betas": list(self.betas)}

    def save(self, params: list[Tensor]) -> dict[int, dict[str, Any]]:
        """Copies of what is kept, by the parameter's number."""
        found = {}
        for position, p in enumerate(params):
            if p in self._kept:
                first, second, steps = self._kept[p]
                found[position] = {"first": first.clone(), "second": second.clone(), "steps": steps}
        return found

    def load(self, params: list[Tensor], saved: Mapping[int, Mapping[str, Any]]) -> None:
        """Takes over what `save` gave."""
        self._kept = {}
        for position, p in enumerate(params):
            if position in saved:
                first, second, steps = saved[position].values()
                self._kept[p] = first.to(p.device, copy=True), second.to(p.device, copy=True), steps

    @torch.no_grad()
    def read(self, groups: list[dict[str, Any]]) -> None:
        """Takes the gradients of a step, before its scores."""
        for group in groups:
            for p in group["params"]:
                if p.grad is not None and not group["dense"]:
                    self._take(p, p.grad if p.dtype == torch.float64 else p.grad.float())

    def _take(self, p: Tensor, grad: Tensor) -> None:
        first, second, steps = self._kept.get(p) or (torch.zeros_like(grad), grad.new_empty(0), 0)
        if self.kind == "sum":
            first += grad
        else:
            first.lerp_(grad, 1 - self.betas[0])
        if self.kind == "adam":
            second = torch.zeros_like(grad) if steps == 0 else second
            second.lerp_(grad.square(), 1 - self.betas[1])
        self._kept[p] = first, second, steps + 1

    def __call__(self, param: Tensor, grad: Tensor) -> Tensor:
        """Scores as `D3`, in the parameter's shape. With "sum" the sum begins anew."""
        if param not in self._kept:
            raise ValueError("heuristic Running: expected the gradients of a step of ID3AdamW, got none")
        first, second, steps = self._kept[param]
        size = first
        if self.kind == "adam":
            corrected = (second / (1 - self.betas[1] ** steps)).sqrt_()
            size = first / (1 - self.betas[0] ** steps) / corrected.clamp_(min=1e-12)
        score = d3_score(param, size, eps=self.d3.eps, exp=self.d3.exp)
        if self.kind == "sum":
            first.zero_()
        return score


def save(heuristic: Any, groups: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Adds what a `Running` keeps to the first param group of a state dict: of a parameter's own state torch
    would cast it to its dtype, and torch.distributed.checkpoint takes no key there that is no parameter's."""
    if isinstance(heuristic, Running):
        state["param_groups"][0][KEY] = heuristic.save(_params(groups))


def load(heuristic: Any, groups: list[dict[str, Any]]) -> None:
    """Takes it out of the first param group, which has been loaded."""
    saved = groups[0].pop(KEY, {})
    if isinstance(heuristic, Running):
        heuristic.load(_params(groups), saved)


def _params(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]

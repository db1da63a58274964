"""A heuristic from the gradients of several steps."""

from __future__ import annotations

from collections.abc import Iterator
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

    Call `watch(optimizer)` once; before every step the heuristic then reads all gradients. It keeps one
    float32 (for "adam" two) for each entry of the parameters. The optimizer's state dict holds these too, so
    that a resumed run goes on bit for bit. Does not apply to released gradients or a GradScaler, whose steps
    it would read scaled. Raises ValueError for another kind.
    """

    def __init__(self, kind: str, d3: D3 = D3(), betas: tuple[float, float] = (0.9, 0.999)):  # noqa: B008
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.d3, self.betas = kind, d3, betas
        self._kept: dict[Tensor, tuple[Tensor, Tensor, int]] = {}  # first and second moment, steps

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Reads the gradients before each of the optimizer's steps, and joins its state dict."""
        optimizer.register_step_pre_hook(self._read)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_post_hook(self._load)

    def describe(self) -> dict[str, Any]:
        """Plain values, which a resumed run must share."""
        return {"kind": self.kind, "d3": heuristics.describe(self.d3), "betas": list(self.betas)}

    def _save(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Adds copies to the first param group: of a parameter's own state torch would cast them to its
        dtype, and torch.distributed.checkpoint takes no key there that is no parameter's."""
        state["param_groups"][0][KEY] = saved = {}
        for position, p in enumerate(_params(optimizer)):
            if p in self._kept:
                first, second, steps = self._kept[p]
                saved[position] = {"first": first.clone(), "second": second.clone(), "steps": steps}

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        saved, self._kept = optimizer.param_groups[0].pop(KEY, {}), {}
        for position, p in enumerate(_params(optimizer)):
            if position in saved:
                first, second, steps = saved[position].values()
                self._kept[p] = first.to(p.device, copy=True), second.to(p.device, copy=True), steps

    @torch.no_grad()
    def _read(self, optimizer: torch.optim.Optimizer, *call: Any) -> None:
        for group in optimizer.param_groups:
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
            raise ValueError("heuristic Running: expected watch(optimizer) before the first step, got none")
        first, second, steps = self._kept[param]
        size = first
        if self.kind == "adam":
            corrected = (second / (1 - self.betas[1] ** steps)).sqrt_()
            size = first / (1 - self.betas[0] ** steps) / corrected.clamp_(min=1e-12)
        score = d3_score(param, size, eps=self.d3.eps, exp=self.d3.exp)
        if self.kind == "sum":
            first.zero_()
        return score


def _params(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])

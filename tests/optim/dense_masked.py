"""The oracle: ID3 with torch.optim.AdamW on masked dense gradients, written without id3_kernels."""

import numpy as np
import torch


def d3_float32(param, grad, eps, exp):
    """Scores in numpy float32, one rounding per operation (exp 0, 1, 2)."""
    theta = np.abs(param.detach().double().numpy().astype(np.float32))
    g = np.abs(grad.double().numpy().astype(np.float32))
    d = theta + np.float32(eps)
    score = {0: lambda: g, 1: lambda: g / d, 2: lambda: g / (d * d)}[exp]()
    tiny = np.finfo(np.float32).tiny
    return np.where(np.isfinite(score) & (score >= tiny) & (g >= tiny), score, np.float32(0)).ravel()


def best(scores, taken, k):
    """Flat positions of the k best of a list of score arrays outside `taken`; ties to the lowest position."""
    flat = np.where(taken, np.float32(0), np.concatenate(scores))
    order = np.argsort(-flat, kind="stable")[:k]
    return order[flat[order] > 0]


class DenseMasked:
    """Increment-D3 (or static) on plain parameters: full scores, a boolean mask, AdamW(foreach=False)."""

    def __init__(self, groups, targets, eps=1.0, exp=2, **adamw):
        self.groups, self.targets, self.eps, self.exp = groups, targets, eps, exp
        self.decays = [g.get("weight_decay", adamw.get("weight_decay", 1e-2)) for g in groups]
        plain = [{**g, "weight_decay": 0.0} for g in groups]
        self.adamw = torch.optim.AdamW(plain, **{**adamw, "weight_decay": 0.0}, foreach=False)
        self.params = [p for g in groups for p in g["params"]]
        self.taken = np.zeros(sum(p.numel() for p in self.params), dtype=bool)
        self.t = 0

    def masks(self):
        sizes = np.cumsum([p.numel() for p in self.params])[:-1]
        parts = np.split(self.taken, sizes)
        return [torch.from_numpy(m.copy()).view(p.shape) for m, p in zip(parts, self.params, strict=True)]

    @torch.no_grad()
    def step(self):
        k = self.targets[min(self.t, len(self.targets) - 1)] - int(self.taken.sum())
        zeros = [np.zeros(p.numel(), np.float32) for p in self.params]
        scores = [
            z if p.grad is None else d3_float32(p, p.grad, self.eps, self.exp)
            for p, z in zip(self.params, zeros, strict=True)
        ]
        self.taken[best(scores, self.taken, k)] = True
        masks = iter(self.masks())
        for group, decay in zip(self.adamw.param_groups, self.decays, strict=True):
            for p in group["params"]:
                mask = next(masks)
                if p.grad is not None:
                    p.grad = p.grad * mask
                    p[mask] = p[mask] * (1 - group["lr"] * decay)
        self.adamw.step()
        self.t += 1

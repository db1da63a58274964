"""ID3 by dense masking: scores and a boolean mask over all N entries, and torch's AdamW on all of them.

It selects by the rule of `id3_optim.ID3AdamW` (D3, uniform schedule, `increment`), at a higher cost.
"""

import torch


class DenseMaskedAdamW(torch.optim.AdamW):
    """AdamW on gradients times a growing mask, with weight decay on unmasked entries.

    Groups with `dense=True` are trained whole. Every other parameter must have a gradient at each step.
    """

    def __init__(self, groups, lr, *, budget, total_steps, eps=1.0, exp=2.0, weight_decay=0.0, fused=True):
        # torch would decay all N entries; `step` decays the unmasked entries.
        groups = [{"weight_decay": weight_decay if group.get("dense") else 0.0, **group} for group in groups]
        super().__init__(groups, lr=lr, fused=fused)
        self.budget, self.total_steps = budget, total_steps
        self.d3_eps, self.d3_exp, self.decay = eps, exp, weight_decay
        self.masked = [p for group in self.param_groups if not group.get("dense") for p in group["params"]]
        self.masks = [torch.zeros_like(p, dtype=torch.bool) for p in self.masked]
        self.steps_done = self.n_active = 0

    @torch.no_grad()
    def step(self, closure=None):
        target = self.budget * min(self.steps_done + 1, self.total_steps) // self.total_steps
        if target > self.n_active:
            self.unmask(target - self.n_active)
            self.n_active = target
        lr = self.param_groups[0]["lr"]
        for param, mask in zip(self.masked, self.masks, strict=True):
            param.grad.mul_(mask)
            param.mul_(1.0 - lr * self.decay * mask)
        self.steps_done += 1
        return super().step(closure)

    def unmask(self, count: int) -> None:
        """Adds the `count` highest D3 scores among masked entries to the mask; ties go to the first entry."""
        scores = torch.cat(
            [
                (p.grad.abs() / (p.abs() + self.d3_eps) ** self.d3_exp).masked_fill_(mask, 0.0).view(-1)
                for p, mask in zip(self.masked, self.masks, strict=True)
            ]
        )
        threshold = torch.topk(scores, count).values[-1]
        chosen = scores > threshold
        chosen[(scores == threshold).nonzero()[: count - int(chosen.sum())]] = True
        for mask, part in zip(self.masks, chosen.split([p.numel() for p in self.masked]), strict=True):
            mask |= part.view_as(mask)

    def state_bytes(self) -> int:
        """Both moments of all entries and the mask; a step needs score tensors of 8 N bytes beside them."""
        moments = (value for state in self.state.values() for value in state.values())
        return sum(tensor.nbytes for tensor in (*moments, *self.masks))

"""ID3AdamW held at a wanted number of active entries, so that every timed step does the same work."""

from dataclasses import dataclass

import torch

from benchmarks.shapes import Inputs
from id3_optim import D3, ID3AdamW

EPS = 1.0
LEARNING_RATE = 1e-3
STEPS = 1000


@dataclass(frozen=True)
class Ramp:
    """A schedule that activates `start` entries at step 0 and `increment` more at each later one."""

    start: int
    increment: int

    def __call__(self, step: int, total_steps: int, budget: int) -> int:
        return self.start + step * self.increment


class Ours:
    """`ID3AdamW` on copies of the weights, with the inputs' own gradients, which a step only reads."""

    prepare = None

    def __init__(self, inputs: Inputs, start: int, increment: int, exp: float, select_every: int = 1):
        self._starts = inputs.starts
        self.params = [torch.nn.Parameter(weight.clone()) for weight in inputs.weights]
        for param, grad in zip(self.params, inputs.grads, strict=True):
            param.grad = grad
        ramp = Ramp(start, increment)
        self.optimizer = ID3AdamW(
            self.params,
            lr=LEARNING_RATE,
            weight_decay=0.0,
            budget=ramp(STEPS - 1, STEPS, 0),
            total_steps=STEPS,
            heuristic=D3(eps=EPS, exp=exp),
            schedule=ramp,
            select_every=select_every,
        )

    def step(self) -> None:
        self.optimizer.step()

    def active(self) -> torch.Tensor:
        """int64, ascending: positions of the active entries, all tensors laid end to end."""
        touched = self.optimizer.touched()
        pairs = zip(self._starts[:-1], touched, strict=True)
        return torch.cat([start + entry.indices.long() for start, entry in pairs])

    def values(self) -> torch.Tensor:
        """All weights, laid end to end (a copy)."""
        return torch.cat([param.detach().flatten() for param in self.params])

    def state_bytes(self) -> int:
        return self.optimizer.memory_report()["total"]

"""What is measured on a GPU: models as lists of shapes, and the ways to take a step on them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.gpu.device import DEVICE
from benchmarks.ours import EPS, LEARNING_RATE
from benchmarks.parts import wanted
from benchmarks.shapes import Inputs, deberta
from id3_kernels import Entries
from id3_optim import D3, ID3AdamW

SPREAD = 3000  # steps that spend a budget: k = B / 3000
EXP = 1.0
_BF16, _F32 = torch.bfloat16, torch.float32

Shape = tuple[int, ...]


def llama(layers: int, hidden: int, inner: int, vocabulary: int) -> list[Shape]:
    """The tensors of a Llama without grouped queries, embeddings untied."""
    layer = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *(layer * layers), (hidden,), (vocabulary, hidden)]


MODELS: dict[str, tuple[Callable[[], list[Shape]], torch.dtype]] = {
    "184M float32": (lambda: [shape for _, shape in deberta()], _F32),
    "184M bfloat16": (lambda: [shape for _, shape in deberta()], _BF16),
    "1.3B bfloat16": (lambda: llama(24, 2048, 5504, 32000), _BF16),
    "6.7B bfloat16": (lambda: llama(32, 4096, 11008, 32000), _BF16),
    "300 tensors": (lambda: [(256, 256)] * 150 + [(256,)] * 150, _F32),
    "tiny float32": (lambda: llama(2, 64, 172, 500), _F32),
    "tiny bfloat16": (lambda: llama(2, 64, 172, 500), _BF16),
}


@dataclass(frozen=True)
class Case:
    """A model, a budget as a share of its entries, and how much of the budget is active when it is timed."""

    model: str
    share: float = 0.001
    active: float = 0.5

    @property
    def dtype(self) -> torch.dtype:
        return MODELS[self.model][1]

    def counts(self) -> tuple[int, int, int]:
        """N, B and k."""
        n = sum(torch.Size(shape).numel() for shape in MODELS[self.model][0]())
        budget = int(n * self.share)
        return n, budget, max(1, budget // SPREAD)

    def about(self) -> dict[str, object]:
        """The fields of every row of this case."""
        n, budget, k = self.counts()
        return {
            "model": self.model,
            "share": self.share,
            "active": self.active,
            "n": n,
            "tensors": len(MODELS[self.model][0]()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "budget": budget,
            "k": k,
            "floor_bytes": 2 * n * self.dtype.itemsize,
        }


def make_inputs(model: str) -> Inputs:
    """Weights and gradients on the device, heavy-tailed, without zeros; a cache of one model."""
    if _newest.get("model") != model:
        _newest.clear()
        _newest.update(model=model, inputs=_make(model))
    return _newest["inputs"]


_newest: dict = {}


def _make(model: str) -> Inputs:
    shapes, dtype = MODELS[model][0](), MODELS[model][1]
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = Inputs(model, [], [])
    for shape in shapes:
        weight, grad = (torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype) for _ in range(2))
        rows = torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=generator, device=DEVICE)
        inputs.weights.append(weight.mul_(0.04))
        inputs.grads.append(grad.mul_(rows.mul_(1.5).exp_().mul_(1e-4).to(dtype)))
    return inputs


class Ours:
    """`ID3AdamW` in the middle of a run: the case's share of the budget is active, k more join at each step.

    Trains the inputs' own weights at a thousandth of the learning rate, so that all timed steps see alike.
    """

    def __init__(self, case: Case, backend: str, **options):
        inputs, (_, budget, _) = make_inputs(case.model), case.counts()
        self.params = [torch.nn.Parameter(weight) for weight in inputs.weights]
        for param, grad in zip(self.params, inputs.grads, strict=True):
            param.grad = grad
        common = {
            "lr": 1e-3 * LEARNING_RATE,
            "weight_decay": 0.0,
            "heuristic": D3(EPS, EXP),
            "backend": backend,
        }
        active, done = int(case.active * budget), int(case.active * SPREAD)
        first = ID3AdamW(self.params, budget=active, total_steps=1, strategy="static", **common)
        first.step()
        state = first.state_dict()
        state["param_groups"][0]["id3"]["step"] = done
        # A schedule that begins with a jump makes every step reserve capacity for such a jump. Where the
        # budget is spent, one of twice the size goes on at the same pace.
        runs = 2 if case.active == 1.0 else 1
        self.optimizer = ID3AdamW(
            self.params, budget=runs * budget, total_steps=runs * SPREAD, **common, **options
        )
        self.optimizer.load_state_dict(state, strict=False)

    def step(self) -> None:
        self.optimizer.step()

    def entries(self) -> Entries:
        """The active entries after the last step."""
        return Entries.from_lists([touched.indices for touched in self.optimizer.touched()])


class Selection:
    """The selection of a step alone, `entries` left out."""

    def __init__(self, kernels, inputs: Inputs, entries: Entries, k: int):
        self._kernels = kernels
        self._arguments = inputs.weights, inputs.grads, *entries, *wanted(k, DEVICE), EPS, EXP

    def run(self):
        """(offsets, indices, scores)."""
        return self._kernels.select_topk(*self._arguments)


def update_bytes(dtype: torch.dtype, n_active: int) -> int:
    """A 32-byte sector of the gradient and of the weight read, one written; index, moments and master."""
    return n_active * (3 * 32 + 4 + 16 + (0 if dtype == _F32 else 8))


@cache
def select_bytes(case: Case) -> int:
    """θ and g read, one float32 maximum per 256 entries written."""
    n = case.counts()[0]
    return 2 * n * case.dtype.itemsize + n // 64

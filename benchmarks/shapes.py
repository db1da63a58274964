"""The parameter lists of two real models, with weights and gradients like those of fine-tuning."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

# Distinct tokens in a batch of 16 short texts; only their rows of the word embedding get a gradient.
TOUCHED_ROWS = 600
TOUCHED_POSITIONS = 64

Shape = tuple[int, ...]


def _linear(name: str, outputs: int, inputs: int) -> list[tuple[str, Shape]]:
    return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]


def _norm(name: str, hidden: int) -> list[tuple[str, Shape]]:
    return [(f"{name}.weight", (hidden,)), (f"{name}.bias", (hidden,))]


def _layers(count: int, hidden: int, projections: tuple[str, ...]) -> list[tuple[str, Shape]]:
    shapes = []
    for layer in range(count):
        at = f"encoder.layer.{layer}"
        for projection in projections:
            shapes += _linear(f"{at}.attention.self.{projection}", hidden, hidden)
        shapes += _linear(f"{at}.attention.output.dense", hidden, hidden)
        shapes += _norm(f"{at}.attention.output.LayerNorm", hidden)
        shapes += _linear(f"{at}.intermediate.dense", 4 * hidden, hidden)
        shapes += _linear(f"{at}.output.dense", hidden, 4 * hidden)
        shapes += _norm(f"{at}.output.LayerNorm", hidden)
    return shapes


def minilm() -> list[tuple[str, Shape]]:
    """sentence-transformers/all-MiniLM-L6-v2: 103 tensors."""
    return [
        ("embeddings.word_embeddings.weight", (30522, 384)),
        ("embeddings.position_embeddings.weight", (512, 384)),
        ("embeddings.token_type_embeddings.weight", (2, 384)),
        *_norm("embeddings.LayerNorm", 384),
        *_layers(6, 384, ("query", "key", "value")),
        *_linear("pooler.dense", 384, 384),
    ]


def deberta() -> list[tuple[str, Shape]]:
    """microsoft/deberta-v3-base: 198 tensors."""
    return [
        ("embeddings.word_embeddings.weight", (128100, 768)),
        *_norm("embeddings.LayerNorm", 768),
        *_layers(12, 768, ("query_proj", "key_proj", "value_proj")),
        ("encoder.rel_embeddings.weight", (512, 768)),
        *_norm("encoder.LayerNorm", 768),
    ]


def tiny() -> list[tuple[str, Shape]]:
    """Fits every test: 4 tensors."""
    return [("embeddings.word_embeddings.weight", (1000, 32)), *_norm("norm", 32), ("head.weight", (64, 32))]


# Name → the shapes, the number of tensors M and of entries N.
MODELS = {"MiniLM-L6": (minilm, 103, 22_713_216), "DeBERTa-v3-base": (deberta, 198, 183_831_552)}
KNOWN = MODELS | {"tiny": (tiny, 4, 34_112)}


@dataclass(frozen=True)
class Inputs:
    """Weights and gradients of one model. They never change: methods that write work on copies."""

    model: str
    weights: list[torch.Tensor]
    grads: list[torch.Tensor]

    @cached_property
    def starts(self) -> list[int]:
        """M + 1 numbers: the position of each tensor's first entry, all tensors laid end to end, and N."""
        return [0, *accumulate(weight.numel() for weight in self.weights)]

    @property
    def n_entries(self) -> int:
        return self.starts[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype


def make_inputs(model: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """The model's tensors, from a fixed seed. model: a key of `KNOWN`; dtype: of weights and gradients."""
    build, count, total = KNOWN[model]
    shapes = build()
    inputs = Inputs(model, [], [])
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes:
        inputs.weights.append(_weight(name, shape, generator).to(dtype))
        inputs.grads.append(_grad(name, shape, generator).to(dtype))
    assert (len(shapes), inputs.n_entries) == (count, total), (len(shapes), inputs.n_entries)
    return inputs


def _weight(name: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Normal at the scale of trained weights, rows of unequal size; LayerNorm weights lie around one."""
    if "LayerNorm" in name and name.endswith("weight"):
        return torch.randn(shape, generator=generator).mul_(0.1).add_(0.9)
    row_scale = torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=generator).mul_(0.3).exp_()
    return torch.randn(shape, generator=generator).mul_(0.04).mul_(row_scale)


def _grad(name: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Heavy-tailed: log-normal scales per tensor, row and column; embeddings are zero in most rows."""
    scale = 1e-4 * torch.randn(1, generator=generator).exp_().item()
    grad = torch.randn(shape, generator=generator).mul_(scale)
    for dim, size in enumerate(shape):
        along = [1] * len(shape)
        along[dim] = size
        grad.mul_(torch.randn(along, generator=generator).mul_(0.7).exp_())
    if "word_embeddings" in name:
        keep = torch.randperm(shape[0], generator=generator)[:TOUCHED_ROWS]
    elif "position_embeddings" in name:
        keep = torch.arange(TOUCHED_POSITIONS)
    else:
        return grad
    # Written, not calloc'ed: untouched pages all map to one page of zeros, and would be read from the cache.
    sparse = torch.empty(shape).zero_()
    sparse[keep] = grad[keep]
    return sparse

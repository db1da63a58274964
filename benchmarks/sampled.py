"""The weight gradient at active entries alone, against the dense product of the same layer."""

from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.cases import DTYPES
from benchmarks.machine import multiplies_bfloat16
from benchmarks.measure import Timed
from id3_kernels import Entries, reference
from id3_kernels.table import kernels_for

KERNELS = kernels_for(torch.device("cpu"), None)
SHARES = (0.0017, 0.01)
_WEIGHTS = ((768, 768), (768, 3072), (2048, 2048), (2048, 5632))
_COMPARED = 2000  # entries whose bits are compared with the reference's


@dataclass(frozen=True)
class Layer:
    """A linear layer [rows, columns] in a backward pass of `tokens` tokens, `share` of its entries active.

    spread: "even", or "hot", in a few rows and columns, as entries of large gradients are.
    """

    rows: int
    columns: int
    tokens: int = 512
    dtype: str = "float32"
    share: float = SHARES[0]
    spread: str = "even"

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}-{self.tokens}-{self.dtype}-{self.share:.2%}-{self.spread}"

    def about(self) -> dict:
        return {"model": f"{self.rows} × {self.columns}", **asdict(self)}


def layer_cases(quick: bool) -> list[Layer]:
    """quick: one layer per dtype; else every size, and the hot spread at 512 tokens."""
    dtypes = [dtype for dtype in DTYPES if dtype != "bfloat16" or multiplies_bfloat16()]
    if quick:
        return [Layer(768, 768, dtype=dtype) for dtype in dtypes]
    cases = []
    for rows, columns in _WEIGHTS:
        for dtype in dtypes:
            plain = [Layer(rows, columns, 512, dtype, share) for share in SHARES]
            cases += [*plain, *(replace(layer, tokens=2048) for layer in plain)]
            cases += [replace(layer, spread="hot") for layer in plain]
    return cases


class Backward:
    """The two factors of a layer's weight gradient, and the active entries."""

    def __init__(self, layer: Layer):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        self.grad = normal(layer.tokens, layer.rows).to(DTYPES[layer.dtype])
        self.input = normal(layer.tokens, layer.columns).to(DTYPES[layer.dtype])
        score = normal(layer.rows, layer.columns).abs()
        if layer.spread == "hot":
            score *= normal(layer.rows, 1).exp() * normal(layer.columns).exp()
        best = score.flatten().topk(int(layer.share * score.numel())).indices
        self.entries = Entries.from_lists([best.sort().values])
        self.values = torch.zeros(len(best))

    def sampled(self) -> None:
        KERNELS.sampled_weight_grad_(self.grad, self.input, *self.entries, self.values, False)

    def dense(self) -> torch.Tensor:
        return self.grad.t() @ self.input

    def check(self) -> None:
        """The bits of the reference, and an error of at most 1.5 times the dense product's."""
        self.sampled()
        index = self.entries.indices.long()
        exact = (self.grad.double().t() @ self.input.double()).flatten()[index]
        errors = (found.double() - exact for found in (self.values, self.dense().flatten()[index]))
        ours, dense = (error.square().mean().sqrt() for error in errors)
        assert ours <= 1.5 * dense, "sampled: less accurate than the dense product"
        some = Entries.from_lists([index[:: len(index) // _COMPARED + 1]])
        wanted = torch.empty(len(some.indices))
        reference.sampled_weight_grad_(self.grad, self.input, *some, wanted, False)
        assert torch.equal(self.values[:: len(index) // _COMPARED + 1], wanted), "sampled: other bits"


def timed_layer(layer: Layer) -> dict[str, Timed]:
    """Both products behind the one that a backward pass computes before, and each behind itself ("_cached").

    Behind the gradient of the input, the gradient of the output is in the cache and the input is not.
    """
    backward = Backward(layer)
    backward.check()
    weight = torch.randn(layer.rows, layer.columns).to(DTYPES[layer.dtype])

    def before():
        return backward.grad @ weight

    products = {"sampled": backward.sampled, "dense": backward.dense}
    timed = {name: Timed(run, touch=before) for name, run in products.items()}
    return timed | {f"{name}_cached": Timed(run, touch=run) for name, run in products.items()}

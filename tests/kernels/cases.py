"""Awkward inputs: Hypothesis draws a short recipe, `build` makes the tensors from it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from id3_kernels import Entries

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PAIRS = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32))  # (param, grad)
SHAPES = ((), (0,), (1,), (7,), (255,), (256,), (257,), (16, 17), (0, 4), (3, 5, 7), (2, 3, 4, 5), (1000,))
VALUES = ("normal", "equal", "quantised", "zeros", "special", "one_mass", "close", "subnormal")
LAYOUTS = ("plain", "transposed", "channels_last", "misaligned", "every_other", "expanded")
SPECIAL_EXPS = (0.0, 0.5, 1.0, 2.0, -0.5, -1.0, -2.0)  # all backends agree bit for bit
OTHER_EXPS = (0.7, 1.5, 3.0, -0.3)
NAN, INF = float("nan"), float("inf")
SPECIALS = (0.0, -0.0, NAN, -NAN, INF, -INF, 1e-40, -1e-42, 1.17549435e-38, 3e-38, 1.0, -1.0, 3.3e38, 65504.0)


class TensorRecipe(NamedTuple):
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    values: tuple[str, str]
    layouts: tuple[str, str]
    has_grad: bool


class Recipe(NamedTuple):
    seed: int
    tensors: tuple[TensorRecipe, ...]
    active_share: float | None
    k: int | float  # a float: that share of all entries


class Problem(NamedTuple):
    params: list[Tensor]
    grads: list[Tensor | None]
    active: Entries | None
    k: int

    def sizes(self) -> list[int]:
        return [p.numel() for p in self.params]


def numbers(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """n float64 numbers of one kind."""
    if kind == "normal":
        return rng.standard_normal(n) * np.exp(rng.standard_normal(n))
    if kind == "equal":
        return np.full(n, rng.choice([0.25, -1.5]))
    if kind == "quantised":
        return rng.integers(-3, 4, n) / 4
    if kind == "special":
        return rng.choice(SPECIALS, n)
    if kind == "close":  # all leading bits the same
        return 1 + rng.integers(0, 4, n) * 2.0**-23
    if kind == "subnormal":  # around the smallest normal float32
        return rng.integers(0, 5, n) * 2.0**-127
    out = np.zeros(n)
    if kind == "one_mass" and n:
        out[rng.integers(n)] = 1e4
    return out


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same logical tensor with other strides, where its shape allows them."""
    if layout == "transposed" and t.dim() >= 2:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "misaligned":
        buffer = torch.full((t.numel() + 1,), 7.0, dtype=t.dtype)
        buffer[1:] = t.reshape(-1)
        return buffer[1:].view(t.shape)
    if layout == "every_other":
        buffer = torch.full((*t.shape, 2), 7.0, dtype=t.dtype)
        buffer[..., 0] = t
        return buffer[..., 0]
    if layout == "expanded" and t.dim() >= 2 and t.numel():
        return t[:1].expand(t.shape)
    return t.contiguous()


def tensor(kind: str, shape, dtype: torch.dtype, layout: str, rng: np.random.Generator) -> Tensor:
    values = numbers(kind, int(np.prod(shape, dtype=np.int64)), rng)
    with np.errstate(over="ignore"):
        return laid_out(torch.from_numpy(values).to(dtype).reshape(shape), layout)


def some_entries(sizes, share: float, rng: np.random.Generator) -> Entries:
    return Entries.from_lists([np.flatnonzero(rng.random(n) < share) for n in sizes])


def build(recipe: Recipe) -> Problem:
    rng = np.random.default_rng(recipe.seed)
    params, grads = [], []
    for shape, dtypes, values, layouts, has_grad in recipe.tensors:
        params.append(tensor(values[0], shape, dtypes[0], layouts[0], rng))
        grad = tensor(values[1], shape, dtypes[1], layouts[1], rng)
        grads.append(grad if has_grad else None)
    sizes = [p.numel() for p in params]
    share = recipe.active_share
    active = None if share is None else some_entries(sizes, share, rng)
    k = recipe.k if isinstance(recipe.k, int) else int(recipe.k * sum(sizes))
    return Problem(params, grads, active, k)


def _tensor_recipes(pairs, writable: bool, shapes):
    readable = st.sampled_from(LAYOUTS)
    layouts = st.sampled_from(LAYOUTS[:-1]) if writable else readable  # an expanded param shares its memory
    kinds = st.sampled_from(VALUES)
    return st.builds(
        TensorRecipe,
        st.sampled_from(shapes),
        st.sampled_from(pairs),
        st.tuples(kinds, kinds),
        st.tuples(layouts, readable),
        st.sampled_from((True, True, True, False)),
    )


def recipes(float64: bool, writable: bool = False, max_tensors: int = 5, shapes=SHAPES):
    """Lists of tensors, active entries and a k. float64: draw problems in float64 as well."""

    def of(pairs):
        tensors = st.lists(_tensor_recipes(pairs, writable, shapes), min_size=1, max_size=max_tensors)
        return st.builds(
            Recipe,
            st.integers(0, 2**32 - 1),
            tensors.map(tuple),
            st.sampled_from((None, 0.0, 0.1, 0.5, 1.0)),
            st.integers(0, 12) | st.sampled_from((0.1, 0.5, 1.0, 2.0)),
        )

    return of(PAIRS) | of(((F64, F64),)) if float64 else of(PAIRS)
